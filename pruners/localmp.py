import torch
from torch import Tensor

from pruners.base import Pruner


class LocalMP(Pruner):
    """Layer-wise magnitude pruning: score = abs(W), compared within each layer."""

    allocation = "layer"

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        return weight.abs()
