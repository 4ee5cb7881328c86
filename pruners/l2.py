import torch
from torch import Tensor

from pruners.base import Pruner


class LayerWiseL2Norm(Pruner):
    """LayerWiseL2Norm: score = abs(W) / Frobenius norm of W, compared over all weights. A layer of zeros scores 0."""

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        magnitude = weight.abs().double()
        norm = torch.linalg.vector_norm(magnitude)
        return magnitude.div_(norm) if norm > 0 else magnitude
