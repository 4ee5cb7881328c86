from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pruners.base import Measured, Pruner, by_name
from sparsity.run.request import PLAIN_PASS, CalibrationPass
from sparsity.view import PrunableView


class SNIP(Pruner):
    """SNIP, arXiv 1810.02340, eq. 6: score = abs(mean gradient of the loss * w), divided by its sum over the model."""

    statistic = "mean_gradient"

    def measure(
        self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass = PLAIN_PASS
    ) -> Measured:
        gradients = by_name(super().measure(view, batches, reading))
        scores = self.scores(view, gradients)
        total = sum(float(score.sum(dtype=torch.float64)) for _, score in scores)
        return {name: gradient.div_(total) for name, gradient in gradients.items()} if total else gradients

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return (weight * statistic).abs_()
