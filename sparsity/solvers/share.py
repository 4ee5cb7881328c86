"""The layers of a block are distributed over the ranks, and each rank gets the solutions of all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from sparsity.errors import UserError

Fields = TypeVar("Fields", bound=tuple[Tensor | None, ...])  # what becomes of a layer
DTYPES = (torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
_AXES = 4  # of a tensor, at most


@dataclass(frozen=True)
class Share:
    """rank: of this process, one of `ranks`. reduce: sums a tensor over them, on `device`; None: there is one rank."""

    rank: int = 0
    ranks: int = 1
    reduce: Callable[[Tensor], Tensor] | None = None
    device: torch.device | str = "cpu"

    def solve(self, names: Sequence[str], solve: Callable[[str], Fields], count: int) -> dict[str, Fields]:
        """Return name -> what becomes of the layer, `count` tensors or None, the same to the bit on all ranks.

        Layer i is solved on rank i % ranks. Where a rank fails, all solve every layer, so that all raise its error.
        """
        if self.reduce is None or self.ranks == 1:
            return {name: solve(name) for name in names}
        mine: dict[str, Fields] = {}
        failed = 0
        try:
            mine = {name: solve(name) for i, name in enumerate(names) if i % self.ranks == self.rank}
        except UserError:
            failed = 1
        if int(self.reduce(torch.tensor([failed], device=self.device))):
            return {name: solve(name) for name in names}
        return {name: cast(Fields, self._spread(mine.get(name), count)) for name in names}

    def _spread(self, fields: tuple[Tensor | None, ...] | None, count: int) -> tuple[Tensor | None, ...]:
        """The tensors of the rank that has them, on all ranks. fields: None on the others."""
        assert self.reduce is not None, "else there is nobody to tell"
        facts = torch.zeros(count, 2 + _AXES, dtype=torch.int64, device=self.device)
        for i, tensor in enumerate(fields or ()):
            if tensor is not None:
                told = [1 + DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
                facts[i, : len(told)] = torch.tensor(told)
        spread: list[Tensor | None] = []
        for i, (kind, ndim, *shape) in enumerate(self.reduce(facts).tolist()):
            own = None if fields is None else fields[i]
            spread.append(self._bits(own, DTYPES[kind - 1], torch.Size(shape[:ndim])) if kind else None)
        return tuple(spread)

    def _bits(self, own: Tensor | None, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """One tensor: sums of its bytes, which are zero on the ranks that do not have it."""
        assert self.reduce is not None, "else there is nobody to tell"
        if own is None:
            sent = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=self.device)
        else:
            sent = own.to(self.device).contiguous().reshape(-1).view(torch.uint8)
        return self.reduce(sent).view(dtype).reshape(shape)


ALONE = Share()


def check_same(what: str, digest: str, reduce: Callable[[Tensor], Tensor], ranks: int, device: torch.device) -> None:
    """Raise UserError on all ranks where they have different digests (hexadecimal) of the same thing."""
    mine = torch.tensor([int(digest[i : i + 7], 16) for i in range(0, 56, 7)], device=device)  # of 28 bits each
    differs = torch.tensor([int(not torch.equal(reduce(mine.clone()), ranks * mine))], device=device)
    if int(reduce(differs)):
        raise UserError(f"the ranks have chosen different {what}: devices or libraries compute differently on them")
