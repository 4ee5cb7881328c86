from collections.abc import Mapping

import torch
from torch import Tensor

from pruners.base import Pruner
from sparsity.statistics.hessian import factor
from sparsity.view import PrunableView


class SparseGPT(Pruner):
    """SparseGPT, arXiv 2301.00774: saliency w^2 / U_jj^2 with U the upper Cholesky factor of the inverse of the damped
    H = (2/n) X X^T, compared within each group of M, or each 128 columns over all rows, block by block.

    With `--reconstruct sparsegpt` (`--enable_update`), the error of what is pruned is compensated in the columns to the
    right, and the mask is chosen on the way (see sparsity.reconstruction.sparsegpt).
    """

    statistic = "hessian"
    allocation, scope = "layer", "block"
    calibration = "sequential"
    solver = "sparsegpt"

    def prepare(self, view: PrunableView, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return 1 / U_jj of each layer, (in,), and 0 where the input was always zero."""
        return {name: _of_columns(name, view.weights[name].matrix(), hessian) for name, hessian in statistics.items()}

    def score(self, weight: Tensor, statistic: Tensor, generator: torch.Generator) -> Tensor:
        return (weight * statistic).square_()


def _of_columns(name: str, weight: Tensor, hessian: Tensor) -> Tensor:
    found = factor(hessian.to(weight.device), weight.shape[1], name, torch.promote_types(weight.dtype, torch.float32))
    return found.diagonal * found.live
