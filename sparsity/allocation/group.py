from collections.abc import Sequence

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget
from sparsity.view import members


class Group(Allocation):
    """Weights compete within their modality, each of which loses the same share."""

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        found = []
        for names in members(part.groups).values():
            numel = sum(part.view.weights[name].numel for name in names)
            found.append(Contest(names, [budget(sparsity, numel) for sparsity in sparsities]))
        return found
