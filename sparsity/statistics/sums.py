"""Sums over calibration batches, one for all layers that have read the very same inputs (query, key and value).

Nothing is said beforehand about who shares: all layers of one width begin with one sum of nothing. Layers that read
something else than those which they share a sum with take a copy of it from then on, so each layer has after each batch
the sum that it would have alone, to the bit.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PIECE = 1 << 18  # elements converted to float64 together


@dataclass(eq=False)
class Measured:
    """An input that was measured: statistic -> what it adds to its sum; samples and real tokens that it has."""

    values: Mapping[str, Tensor]
    samples: int
    tokens: int


@dataclass(eq=False)
class Branch:
    """An input that some of the layers which share a sum have read, and that is not yet added for them."""

    measured: Measured
    names: list[str]


@dataclass(eq=False)
class Sum:
    """The sum over what some layers have seen, all the same, in the same order. values: statistic -> sum.

    A layer is in one branch at most. Once each is in one, the sum becomes as many sums.
    """

    names: list[str]
    values: dict[str, Tensor]
    samples: int = 0
    tokens: int = 0
    branches: list[Branch] = field(default_factory=list)

    def take(self, measured: Measured) -> None:
        """Add an input."""
        for statistic, value in measured.values.items():
            add(self.values[statistic], value)
        self.samples += measured.samples
        self.tokens += measured.tokens


class SharedSums:
    """The sums of the layers. roots: layers that may share, and their sums of nothing, which become this object's."""

    def __init__(self, roots: Iterable[tuple[list[str], dict[str, Tensor]]]):
        self._of = {name: shared for names, zeros in roots for shared in [Sum(names, zeros)] for name in names}
        self._read = False  # whether anything was added: until then all layers of a root are together

    def __getitem__(self, name: str) -> Sum:
        return self._of[name]

    def all(self) -> list[Sum]:
        """Return each sum once, in the order of the first of its layers."""
        return list({id(shared): shared for shared in self._of.values()}.values())

    def add(self, name: str, measured: Measured) -> None:
        """Add an input to the sum of a layer; layers that give the same object share what it adds to."""
        self._read, shared = True, self._of[name]
        before = next((branch for branch in shared.branches if name in branch.names), None)
        if before:  # it reads once more, before others have read at all
            self._leave(shared, before)
            shared = self._of[name]
        branch = next((branch for branch in shared.branches if branch.measured is measured), None)
        if branch is None:
            branch = Branch(measured, [])
            shared.branches.append(branch)
        branch.names.append(name)
        if sum(len(each.names) for each in shared.branches) == len(shared.names):
            *others, last = shared.branches
            for other in others:
                self._leave(shared, other)
            shared.branches = []
            shared.take(last.measured)

    def settle(self) -> None:
        """Add what was given: layers that have read nothing by the end of a batch do not share it."""
        for shared in self.all():
            for branch in list(shared.branches):
                self._leave(shared, branch)

    def _leave(self, shared: Sum, branch: Branch) -> None:
        """Give the layers of a branch a sum of their own."""
        shared.branches.remove(branch)
        self._part(shared, branch.names).take(branch.measured)

    def _part(self, shared: Sum, names: list[str]) -> Sum:
        """Give these layers a copy of their sum."""
        values = {statistic: value.clone() for statistic, value in shared.values.items()}
        new = Sum(names, values, shared.samples, shared.tokens)
        shared.names = [name for name in shared.names if name not in names]
        self._of |= dict.fromkeys(names, new)
        return new

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all ranks, each of which has settled: a tensor for each sum and statistic."""
        self._agree(all_reduce)
        shares = self.all()
        for shared in shares:
            for statistic, value in shared.values.items():
                shared.values[statistic] = all_reduce(value)
        counts = torch.tensor([[shared.samples, shared.tokens] for shared in shares]).to(self._device)
        for shared, (samples, tokens) in zip(shares, all_reduce(counts).tolist(), strict=True):
            shared.samples, shared.tokens = samples, tokens

    def _agree(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Let layers share what they share on all ranks that have read a batch, and nothing else.

        A layer is told by the number of the first layer that it shares with, its leader. Ranks agree on a leader where
        all say the same number, which sums can tell: n * (sum of squares) = (sum) ^ 2 for equal numbers alone. Layers
        with one leader that all agree on are together everywhere; others have a sum of their own.
        """
        numbers = {name: number for number, name in enumerate(self._of)}
        leaders = torch.tensor([numbers[shared.names[0]] for shared in self._of.values()])
        told = torch.stack([torch.ones_like(leaders), leaders, leaders**2]) * int(self._read)
        ranks, total, squares = all_reduce(told.to(self._device)).cpu()
        if not ranks[0]:
            return
        agreed = (ranks * squares == total**2).tolist()
        together: dict[tuple[bool, int], list[str]] = {}
        for (name, number), agree, leader in zip(numbers.items(), agreed, (total // ranks).tolist(), strict=True):
            together.setdefault((agree, leader if agree else number), []).append(name)
        for names in together.values():
            if len(names) < len(self._of[names[0]].names):
                self._part(self._of[names[0]], names)

    @property
    def _device(self) -> torch.device:
        return next(iter(next(iter(self._of.values())).values.values())).device


def add(total: Tensor, measured: Tensor) -> None:
    """Add in place. On the CPU a float32 tensor is converted piece by piece: several times as fast as at once."""
    if total.dtype == measured.dtype or not total.is_cpu:
        total += measured
        return
    for piece, more in zip(total.view(-1).split(_PIECE), measured.view(-1).split(_PIECE), strict=True):
        piece += more.double()
