"""The least-squares problem of a layer: what its solvers start from, and the error that they make small.

With the inputs of the layer as rows of X (n, in), G = X'X / n and H = G + ridge, the updated weights B minimise

    E(B) = tr((W - B) H (W - B)'),

whose gradient vanishes where B H = C = W H, on the weights that are kept. `--target dense:a` wants another output: a
that of the dense model on its own inputs X, and 1 - a that of W on the inputs Xh that the pruned model gives, whose Gram
matrix Gh then takes the place of G:

    C = a W (X'Xh) / n + (1 - a) W Gh + W ridge.

The ridge pulls towards W. Statistics of a layer: "hessian", strips of 2 Gh; "cross", X'Xh / n, (in, in), of the dense
target; "dense_hessian", strips of 2 X'X / n, for the error with that target alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.reconstruction.base import Problem
from sparsity.statistics.hessian import triangle


def symmetric(packed: Tensor, width: int) -> Tensor:
    """Return the whole symmetric matrix, (in, in), of strips."""
    upper = triangle(packed, width)
    return upper.add_(upper.triu(1).t())


@dataclass(frozen=True)
class Equations:
    """B H = C, before a ridge is added to both sides.

    weight: W, (out, in), in at least float32. gram: G (in, in), of the inputs that the layer gets. wanted: (in, in),
    what W is multiplied with in C; `gram` itself where the target is the layer's own output.
    """

    weight: Tensor
    gram: Tensor
    wanted: Tensor

    def ridge(self, damp: float) -> float:
        """Return lambda: damp times the mean of G's diagonal over live columns (over none: 1)."""
        diagonal = self.gram.diagonal()
        live = diagonal > 0
        return damp * float(diagonal[live].mean() if live.any() else 1.0)

    def matrix(self, ridge: float | Tensor) -> Tensor:
        """Return H = G + ridge, (in, in). ridge: lambda, or the diagonal (in,) that is added."""
        H = self.gram.clone()
        H.diagonal().add_(ridge)
        return H

    @property
    def same(self) -> bool:
        """Return whether the target is the output of W on the inputs that the layer gets."""
        return self.wanted is self.gram

    def right(self, ridge: float | Tensor) -> Tensor:
        """Return C, (out, in). ridge: as in `matrix`."""
        return (self.weight @ self.wanted).addcmul_(self.weight, torch.as_tensor(ridge).to(self.weight))


def equations(problem: Problem) -> Equations:
    """Return the equations of a layer, in float32 or better on the weight's device, never aliasing what it holds.

    UserError where the target is the dense model's and the statistic "cross" is missing.
    """
    weight, width = problem.weight, problem.weight.shape[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gram = _gram(problem, "hessian", dtype)
    wanted, a = gram, problem.dense_share
    if a:
        if "cross" not in problem.statistics:
            raise UserError(f"layer {problem.name!r}: --target dense needs the inputs of the dense model")
        wanted = gram.lerp(problem.statistics["cross"].to(weight.device, dtype).view(width, width), a)
    return Equations(weight.detach().to(dtype), gram, wanted)


def relative_error(problem: Problem, updated: Tensor, damp: float) -> float:
    """Return E(B) / E(0) of a layer's updated weights, (out, in), with H damped: the error of the output that is wanted
    over its size. With the dense target the statistic "dense_hessian" is needed too. 0 where nothing is wanted.
    """
    layer = equations(problem)
    lam, W, B = layer.ridge(damp), layer.weight, updated.to(layer.weight.dtype)
    if layer.same:
        H = layer.matrix(lam)
        lost = W - B
        error, size = _form(lost, H, lost), _form(W, H, W)
    else:
        # The wanted output is W (a X + (1 - a) Xh)', and its own Gram matrix K has both inputs and their products.
        a, cross = problem.dense_share, problem.statistics["cross"].to(W)
        K = (
            a * a * _gram(problem, "dense_hessian", W.dtype)
            + (1 - a) ** 2 * layer.gram
            + a * (1 - a) * (cross + cross.t())
        )
        K.diagonal().add_(lam)
        C, H = layer.right(lam), layer.matrix(lam)
        size = _form(W, K, W)
        error = size - 2 * float((C.double() * B.double()).sum()) + _form(B, H, B)
    return max(error, 0.0) / size if size > 0 else 0.0


def _form(left: Tensor, H: Tensor, right: Tensor) -> float:
    """Return tr(left H right'), summed in float64."""
    return float(((left @ H).double() * right.double()).sum())


def _gram(problem: Problem, statistic: str, dtype: torch.dtype) -> Tensor:
    packed = problem.statistics[statistic].to(problem.weight.device)
    return symmetric(packed.to(dtype), problem.weight.shape[1]).div_(2)
