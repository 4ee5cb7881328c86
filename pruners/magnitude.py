import torch
from torch import Tensor

from pruners.base import Pruner


class Magnitude(Pruner):
    """Magnitude pruning as one-shot N:M methods are compared with it: score = abs(W), within each group of M, or within
    each layer."""

    allocation = "layer"

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        return weight.abs()
