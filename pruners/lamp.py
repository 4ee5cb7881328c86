import torch
from torch import Tensor

from pruners.base import Pruner
from sparsity.selection import ascending


class LAMP(Pruner):
    """Layer-adaptive magnitude pruning, arXiv 2010.07611, eq. 5: with the layer's w^2 in ascending order (ties by
    index), score = w^2 / (itself + all after it), summed from the top in float64: the last scores exactly 1."""

    def score(self, weight: Tensor, statistic: None, generator: torch.Generator) -> Tensor:
        scores = torch.empty(weight.numel(), dtype=torch.float64, device=weight.device)
        order = ascending(weight.abs().flatten())
        squares = weight.flatten()[order].double().square_()  # indexing has copied
        rest = squares.flip(0).cumsum(0).flip(0)
        squares.div_(rest).nan_to_num_(nan=0.0)  # zero weights score 0, in a layer of zeros too
        return scores.scatter_(0, order, squares).view(weight.shape)
