import torch
from torch import Tensor

from pruners.layer_wise import LayerWise


class Wanda(LayerWise):
    """Wanda, arXiv 2306.11695, eq. 1: score_ij = abs(w_ij) * ||X_j||_2, compared within each output row, or each group
    of M.

    calibration_mode: "dense" (default) or "sequential", and offload: see `LayerWise`.
    """

    statistic = "input_norms"
    pool = "row"
    mode = "dense"

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return weight.abs().double() * statistic.sqrt()
