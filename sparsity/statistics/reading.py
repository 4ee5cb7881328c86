"""One reading of the calibration data: what a plan may use of it, and how."""

from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.selection import Named
from sparsity.statistics.gradient_rows import Scratch
from sparsity.view import PrunableView


@dataclass(frozen=True)
class CalibrationPass:
    """One reading of the calibration data.

    batches: an iterable, which a plan that reads the same batches more than once needs with a length; None: there is no
    data. progress: wraps the batches, as tqdm does. reduce: sums a tensor over ranks, each of which reads its own
    batches. generators: number of a batch -> the generator of what the loss draws there. rounds: for each round of
    batches that belong together, how many of them come here. scratch: where what is computed is kept for a run that is
    killed, and what is too large for memory. arithmetic: a context in which the model runs, such as autocast.
    capture_budget: bytes of captured calls that are held in memory; more go to a file (None: all are held). place: rank
    of this process, and how many there are, between which the layers of a block are shared out.
    """

    batches: Iterable[Any] | None = None
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    generators: Callable[[int], torch.Generator] | None = None
    rounds: Sequence[int] | None = None
    scratch: Scratch | None = None
    arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext
    capture_budget: int | None = None
    place: tuple[int, int] = (0, 1)

    def over(self) -> Iterable[Any]:
        """Return the batches, with their progress shown. UserError where there are none."""
        if self.batches is None:
            raise UserError("calibration data is needed, and there is none")
        return self.progress(self.batches) if self.progress else self.batches

    @property
    def rereadable(self) -> bool:
        """Whether the same batches can be read more than once."""
        return self.batches is None or isinstance(self.batches, Sized)

    def rounds_of(self) -> Sequence[int]:
        """Return the rounds, by default one for each batch. UserError where the number of batches is not known."""
        if self.rounds is not None:
            return self.rounds
        if not isinstance(self.batches, Sized):
            raise UserError("it must be known how many batches there are: give a list, or a loader with a length")
        return [1] * len(self.batches)


Calibrations = Callable[[int], CalibrationPass]  # the pass of an epoch: fresh batches for each


@dataclass(frozen=True)
class Target:
    """One set of masks: its sparsity, a fraction; the pattern, if that decides; and what chooses from scores.

    choose: from what computes the scores of weights by name, the masks, (name, bool (out, in)).
    """

    sparsity: Any
    pattern: NM | None
    choose: Callable[[Callable[[Sequence[str]], Named]], Named]


class Statistic(Protocol):
    """A statistic that serves one target alone, since it depends on it."""

    @property
    def name(self) -> str: ...

    def collect(self, view: PrunableView, reading: CalibrationPass, target: Target) -> dict[str, Tensor]:
        """Return name -> statistic for each prunable weight."""
        ...
