from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity
from sparsity.allocation.ratios import competing


class Global(Allocation):
    """All weights compete; where layers have bounds, what the scores take from each is clipped to these."""

    by_scores = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return one contest, or one for each layer. UserError for bounds that the budget cannot meet."""
        return competing(part, sparsities)
