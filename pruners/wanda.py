import torch
from torch import Tensor

from pruners.base import Pruner


class Wanda(Pruner):
    """Wanda, arXiv 2306.11695, eq. 1: score_ij = abs(w_ij) * ||X_j||_2, compared within each output row, or each group
    of M.
    """

    statistic = "input_norms"
    allocation, scope = "layer", "row"

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return weight.abs().double() * statistic.sqrt()
