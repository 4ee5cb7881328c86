import torch
from torch import Tensor

from pruners.base import Pruner


class Rand(Pruner):
    """Random pruning: scores are i.i.d. uniform, one draw from the seed for all sparsities and devices."""

    draws = True

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        return torch.rand(weight.shape, generator=generator).to(weight.device)
