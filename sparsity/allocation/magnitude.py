from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part, by_groups
from sparsity.allocation.budget import Sparsity
from sparsity.allocation.ratios import clipped, limits, total_of
from sparsity.selection import counts_by_name


class Magnitude(Allocation):
    """MULTIFLOW's, arXiv 2404.05621, eq. 7: a layer loses as many weights as a selection by abs(W) over its modality
    takes from it, clipped to the bounds of the layer.
    """

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer. UserError for bounds that the budget of a modality cannot meet."""
        found: dict[str, Contest] = {}
        for own in by_groups(part):
            bounds = limits(own)
            totals = [total_of(own, sparsity, bounds) for sparsity in sparsities]
            counts = counts_by_name(partial(_magnitudes, own), totals)
            found |= {contest.names[0]: contest for contest in clipped(own, totals, counts)}
        return [found[name] for name in part.names]


def _magnitudes(part: Part) -> Iterator[tuple[str, Tensor]]:
    return ((name, part.view.weights[name].matrix().abs()) for name in part.names)
