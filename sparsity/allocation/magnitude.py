from collections.abc import Iterator, Sequence

from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget
from sparsity.selection import counts_by_name
from sparsity.view import members


class Magnitude(Allocation):
    """MULTIFLOW's, arXiv 2404.05621, eq. 7: a layer loses as many weights as a selection by abs(W) over its modality
    takes from it.
    """

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        found: dict[str, list[int]] = {}
        for names in members(part.groups).values():

            def magnitudes(names: Sequence[str] = names) -> Iterator[tuple[str, Tensor]]:
                return ((name, part.view.weights[name].matrix().abs()) for name in names)

            numel = sum(part.view.weights[name].numel for name in names)
            counted = counts_by_name(magnitudes, [budget(sparsity, numel) for sparsity in sparsities])
            found |= {name: [count[name] for count in counted] for name in names}
        return [Contest([name], found[name]) for name in part.names]
