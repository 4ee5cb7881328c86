"""How much of a layer's output is lost when the layer is pruned, on the inputs that the dense model gives it."""

import torch
from torch import Tensor

from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.equations import equations
from sparsity.solvers.conjugate import least_squares

_ROWS, _SOLVED_ROWS = 256, 64  # of a larger layer so many, evenly spread, tell the error: masked, and solved for


class LayerError:
    """The relative error E(B) / E(0) = tr((W - B) H (W - B)') / tr(W H W') of one layer under one mask after another,
    with H = X'X / n, damped. 0 for a layer whose output is 0.

    solved: B is the least-squares optimum of the mask, which stands for every reconstruction (lsq is it, the others
    approach it); else B is W where the mask keeps it. weight: W, (out, in). hessian: strips of 2 X'X / n.
    """

    def __init__(self, name: str, weight: Tensor, hessian: Tensor, *, solved: bool, damp: float):
        layer = equations(Problem(name, weight, {"hessian": hessian}))
        self._weight, self._H, self._solved = layer.weight, layer.matrix(layer.ridge(damp)), solved
        most = _SOLVED_ROWS if solved else _ROWS
        self._rows = torch.linspace(0, len(weight) - 1, min(most, len(weight)), device=weight.device).round().long()

    def on_few_rows(self, kept: Tensor) -> float:
        """Return the relative error under a mask, bool (out, in), over at most 64 rows, or 256 that are not solved."""
        W = self._weight[self._rows]
        return self._relative(W, self._pruned(W, kept[self._rows]))

    def pruned(self, kept: Tensor) -> tuple[Tensor, float]:
        """Return the pruned weights, (out, in), of all rows, and their relative error."""
        B = self._pruned(self._weight, kept)
        return B, self._relative(self._weight, B)

    def _pruned(self, W: Tensor, kept: Tensor) -> Tensor:
        return least_squares(W, self._H, kept) if self._solved else W * kept

    def _relative(self, W: Tensor, B: Tensor) -> float:
        error, size = self._form(W - B), self._form(W)
        return error / size if size > 0 else 0.0

    def _form(self, rows: Tensor) -> float:
        """Return tr(rows H rows'), summed in float64."""
        return float(((rows @ self._H).double() * rows.double()).sum())
