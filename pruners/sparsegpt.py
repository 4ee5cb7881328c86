from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pruners.layer_wise import LayerWise
from sparsity.allocation.budget import Sparsity
from sparsity.pattern import NM
from sparsity.reconstruction.sparsegpt import reconstruct, saliency
from sparsity.statistics.hessian import Factor, factor
from sparsity.view import PrunableView


class SparseGPT(LayerWise):
    """SparseGPT, arXiv 2301.00774: saliency w^2 / U_jj^2 with U the upper Cholesky factor of the inverse of the damped
    H = (2/n) X X^T, compared within each group of M, or each 128 columns over all rows (see
    sparsity.reconstruction.sparsegpt).

    enable_update: the error of the weights that go is compensated in the columns to the right, and the masks carry the
    updated weights (`Masks.weights`); by default the others stay as they are. calibration_mode: "sequential" (default)
    or "dense", and offload: see `LayerWise`.
    """

    statistic = "hessian"
    pool = "block"
    mode = "sequential"
    trains = True
    cheap = False

    def __init__(self, enable_update: bool = False, calibration_mode: str | None = None, offload: bool = False):
        super().__init__(calibration_mode, offload)
        self.updates = enable_update
        self.scored = self.scored and not enable_update

    def scores(
        self,
        view: PrunableView,
        statistics: Mapping[str, Tensor],
        *,
        seed: int = 42,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        for name in view.weights if names is None else names:
            weight = view.weights[name].matrix()
            yield name, saliency(weight, _factor(name, weight, statistics[name]))

    def reconstruct(
        self, name: str, weight: Tensor, statistic: Tensor, sparsity: Sparsity | None, pattern: NM | None
    ) -> tuple[Tensor, Tensor]:
        return reconstruct(weight, _factor(name, weight, statistic), sparsity, pattern)

    def _provenance(self, view: PrunableView, seed: int) -> dict[str, Any]:
        return super()._provenance(view, seed) | {"enable_update": self.updates}


def _factor(name: str, weight: Tensor, hessian: Tensor) -> Factor:
    return factor(hessian.to(weight.device), weight.shape[1], name, torch.promote_types(weight.dtype, torch.float32))
