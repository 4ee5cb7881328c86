from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part, by_groups
from sparsity.allocation.budget import Sparsity
from sparsity.allocation.ratios import competing


class Group(Allocation):
    """Weights compete within their modality, each of which loses the same share; bounds of layers as in `Global`."""

    by_scores = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return one contest for each modality, or for each layer. UserError for bounds that a budget cannot meet."""
        return [contest for own in by_groups(part) for contest in competing(own, sparsities)]
