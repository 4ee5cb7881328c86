import torch
from torch import Tensor

from pruners.base import Pruner


class RIA(Pruner):
    """Relative importance and activations (Plug-and-Play, ICLR 2024): score_ij = (abs(w_ij) / sum over i of abs(w_ij) +
    abs(w_ij) / sum over j of abs(w_ij)) * ||X_j||_2^(1/2), compared within each output row, or each group of M. A
    quotient 0 / 0 is 0.
    """

    statistic = "input_norms"
    allocation, scope = "layer", "row"

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        magnitude = weight.abs().double()  # (out, in)
        columns = magnitude.sum(dim=0)  # (in,)
        rows = magnitude.sum(dim=1, keepdim=True)  # (out, 1)
        # The sum is 0 only where all of its weights are, and then anything else in its place gives 0.
        relative = magnitude / columns.where(columns > 0, 1) + magnitude / rows.where(rows > 0, 1)
        return relative.mul_(statistic.sqrt().sqrt())
