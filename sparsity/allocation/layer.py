from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget


class Layer(Allocation):
    """Every layer loses the same share, or every row or block of it where these are the scope."""

    local = even = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        sizes = {name: part.view.weights[name].numel for name in part.names}
        return [Contest([name], [budget(s, size) for s in sparsities], even=True) for name, size in sizes.items()]
