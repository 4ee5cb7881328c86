from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruners.base import Again, Measured, Pruner
from sparsity.allocation.budget import Sparsity
from sparsity.errors import UserError
from sparsity.learned.scores import choice, learn, start_from_magnitude
from sparsity.masks import Masks
from sparsity.run.request import PLAIN_PASS, CalibrationPass, Request
from sparsity.statistics.gradients import batch_generator
from sparsity.view import PrunableView


class TAMT(Pruner):
    """Task-agnostic mask training, arXiv 2204.11218: a score of each weight is trained on the pretraining loss of the
    model under the mask of the highest abs(score), straight-through; the weights are frozen. Each sparsity is trained
    for, from the dense model; a step is a round of batches, and `num_batches` the number of steps.

    mask_lr: AdamW's rate at the first step, from which it goes linearly to 0. mask_decay: its weight decay.
    """

    statistic = "learned_scores"
    scored, trains = False, True

    def __init__(self, mask_lr: float = 5e-5, mask_decay: float = 0.01):
        self.mask_lr, self.mask_decay = mask_lr, mask_decay

    def measure(
        self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass = PLAIN_PASS
    ) -> Mapping[str, Tensor]:
        """The scores learned for the masks that the pass is for; nothing is read where it does not say for which, since
        sparsities share nothing.
        """
        request = reading.request
        if request is None:
            return {}
        if batches is None:
            raise UserError("pruner 'tamt' needs calibration data")
        return learn(
            view,
            start_from_magnitude(view, request.target, request.pattern),
            choice(view, request.target, pattern=request.pattern, pool=request.pool or self.pool),
            reading.over(batches),
            rounds=reading.rounds_of(batches),
            lr=self.mask_lr,
            weight_decay=self.mask_decay,
            generators=reading.generators,
            reduce=reading.reduce,
        )

    def score(self, weight: Tensor, statistic: Tensor | None, generator: torch.Generator) -> Tensor:
        if statistic is None:
            raise UserError("tamt learns other scores for each sparsity: there are none that serve all")
        return statistic.abs()

    def masks(
        self, view: PrunableView, statistics: Measured, request: Request, again: Again | None = None
    ) -> Iterator[tuple[Sparsity, Masks]]:
        self._check(request)
        if again is None:
            raise UserError("tamt reads the batches anew for each sparsity")
        for one in request.each():
            ((sparsity, kept),) = super().masks(view, again(0, request=one), one)
            kept.provenance |= {"mask_lr": self.mask_lr, "mask_decay": self.mask_decay}
            yield sparsity, kept

    def _prune(
        self, view: PrunableView, batches: Iterable[Any] | None, request: Request, reading: CalibrationPass
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """As any pruner's, but the batches are read for each sparsity, and each is a step."""
        reading = replace(reading, generators=partial(batch_generator, request.seed))
        again = self._rereading(view, batches, reading, "sparsity")
        yield from self.masks(view, {}, request, again)
