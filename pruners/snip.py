from collections.abc import Mapping

import torch
from torch import Tensor

from pruners.base import Pruner
from sparsity.view import PrunableView


class SNIP(Pruner):
    """SNIP, arXiv 1810.02340, eq. 6: score = abs(mean gradient of the loss * w), divided by its sum over the model."""

    statistic = "mean_gradient"

    def prepare(self, view: PrunableView, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Divide the gradients, in place, by the sum of abs(gradient * w)."""
        products = ((view.weights[name].matrix() * gradient).abs_() for name, gradient in statistics.items())
        total = sum(float(product.sum(dtype=torch.float64)) for product in products)
        return {name: gradient.div_(total) for name, gradient in statistics.items()} if total else statistics

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return (weight * statistic).abs_()
