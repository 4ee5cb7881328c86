import torch
from torch import Tensor

from pruners.base import Pruner


class MultiFlow(Pruner):
    """MULTIFLOW, arXiv 2404.05621: with a_ij = abs(w_ij) * ||X_j||, score_ij = (mean over j of a_ij) * abs(w_ij) *
    (mean over i of a_ij), eq. 6; layers lose what a magnitude selection over their modality takes, eq. 7 and 8.
    """

    statistic = "input_norms"
    allocation = "magnitude"

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        magnitude, norms = weight.abs().double(), statistic.sqrt()  # (out, in), (in,)
        inward = magnitude.mean(dim=0) * norms  # (in,)
        outward = (magnitude @ norms) / weight.shape[1]  # (out,)
        return magnitude.mul_(outward[:, None]).mul_(inward)
