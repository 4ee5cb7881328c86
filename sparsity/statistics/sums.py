"""Sums over calibration batches, one for all layers that have read the very same inputs (query, key and value).

Nothing is said beforehand about who shares: all layers of one width begin with one sum of nothing. A layer that reads
something else than those which it shares a sum with takes a copy of it from then on, so each layer has at any time the
sum that it would have alone, to the bit.
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
class Sum:
    """What some layers have seen, all the same, in the same order.

    values: statistic -> sum. given: an input that some of the layers have read, `ahead`, and the others have yet to
    read; it is added once all have.
    """

    names: list[str]
    values: dict[str, Tensor]
    samples: int = 0
    tokens: int = 0
    given: Measured | None = None
    ahead: list[str] = field(default_factory=list)

    def take(self) -> None:
        """Add the input that was given."""
        assert self.given is not None, "there is an input"
        for statistic, measured in self.given.values.items():
            add(self.values[statistic], measured)
        self.samples += self.given.samples
        self.tokens += self.given.tokens
        self.given, self.ahead = None, []


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
        if shared.given is not None and (shared.given is not measured or name in shared.ahead):
            self._part(shared, shared.ahead)
            shared = self._of[name]
        shared.given = measured
        shared.ahead.append(name)
        if len(shared.ahead) == len(shared.names):
            shared.take()

    def settle(self) -> None:
        """Add what was given: layers that have not read it by the end of a batch do not share it."""
        for shared in self.all():
            if shared.given is not None:
                self._part(shared, shared.ahead)

    def _part(self, shared: Sum, names: list[str]) -> None:
        """Give these layers a copy of their sum, with what they alone have read."""
        values = {statistic: value.clone() for statistic, value in shared.values.items()}
        new = Sum(names, values, shared.samples, shared.tokens, shared.given, names)
        shared.names = [name for name in shared.names if name not in names]
        shared.given, shared.ahead = None, []
        if new.given is not None:
            new.take()
        new.ahead = []
        self._of |= dict.fromkeys(names, new)

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
