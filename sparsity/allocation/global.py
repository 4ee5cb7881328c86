from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget


class Global(Allocation):
    """All weights compete with each other: a layer loses as many as its scores say."""

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        return [Contest(part.names, [budget(sparsity, part.numel) for sparsity in sparsities])]
