import torch
from torch import Tensor

from pruners.base import Pruner


class Taylor(Pruner):
    """First-order Taylor expansion, arXiv 1906.10771: score = mean over batches of (w * g)^2, with g the gradient of
    the loss of one batch; compared over all weights.
    """

    statistic = "squared_gradient"

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return weight.to(statistic.dtype).square().mul_(statistic)
