import torch
from torch import Tensor

from pruners.base import Pruner


class OMP(Pruner):
    """One-shot magnitude pruning: score = abs(W), compared over all weights (`--pool layer` or `group` on request)."""

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        return weight.abs()
