from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget
from sparsity.allocation.ratios import clipped, limits, total_of


class Layer(Allocation):
    """Every layer loses the same share, or every row or block of it where these are the scope. Where a layer has lost
    more already, the others lose less, in proportion to their size.
    """

    local = even = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer. UserError for bounds that the budget cannot meet."""
        bounds, sizes = limits(part), part.sizes
        counts = [[budget(sparsity, size) for size in sizes] for sparsity in sparsities]
        if all(bounds.allow(each) for each in counts):
            return [Contest([name], [each[i] for each in counts], even=True) for i, name in enumerate(part.names)]
        totals = [total_of(part, sparsity, bounds) for sparsity in sparsities]
        return clipped(part, totals, [dict(zip(part.names, sizes, strict=True)) for _ in sparsities])
