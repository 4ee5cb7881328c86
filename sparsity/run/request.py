"""What is asked of a pruner: masks, and a pass over the calibration data."""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.statistics.gradient_rows import Scratch


@dataclass(frozen=True)
class Request:
    """Which masks are wanted.

    sparsities: fractions, one set of masks for each; or else pattern, which takes the place of sparsities and pool.
    pool: among which weights scores are compared (`sparsity.allocation.budget.POOLS`); None: the pruner's own. seed: of
    what the pruner draws.
    """

    sparsities: Sequence[Sparsity] = ()
    pattern: NM | None = None
    pool: str | None = None
    seed: int = 42

    def each(self) -> "list[Request]":
        """Return a request for each set of masks."""
        return [self] if self.pattern else [replace(self, sparsities=(sparsity,)) for sparsity in self.sparsities]

    @property
    def target(self) -> Sparsity:
        """The sparsity of a request for one set of masks."""
        if self.pattern:
            return self.pattern.sparsity
        (sparsity,) = self.sparsities
        return sparsity


@dataclass(frozen=True)
class CalibrationPass:
    """How a pass reads the calibration batches, and what for.

    progress: wraps the batches, as tqdm does. reduce: sums a tensor over ranks, each of which reads its own batches.
    generators: number of a batch -> the generator of what the loss draws there. rounds: for each round of batches that
    belong together, how many of them come here; for pruners that tell one round from another. scratch: where a
    statistic that is too large for memory is kept; for pruners that have such ones. names: of the weights whose
    statistics are wanted, for pruners that go block by block. request: the one set of masks that the pass is for, for
    pruners that share nothing between two of them.
    """

    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    generators: Callable[[int], torch.Generator] | None = None
    rounds: Sequence[int] | None = None
    scratch: Scratch | None = None
    names: Sequence[str] | None = None
    request: Request | None = None

    def over(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return the batches, with their progress shown."""
        return self.progress(batches) if self.progress else batches

    def rounds_of(self, batches: Iterable[Any]) -> Sequence[int]:
        """Return the rounds, by default one for each batch. UserError where the number of batches is not known."""
        if self.rounds is not None:
            return self.rounds
        if not isinstance(batches, Sized):
            raise UserError("it must be known how many batches there are: give a list, or a loader with a length")
        return [1] * len(batches)


PLAIN_PASS = CalibrationPass()
