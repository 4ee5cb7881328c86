"""The least-squares problem of a layer: what its solvers start from, and the error that they make small.

With the inputs of the layer as rows of X (n, in), G = X'X / n and H = G + ridge, the updated weights B minimise

    E(B) = tr((W - B) H (W - B)'),

whose gradient vanishes where B H = C = W H, on the weights that are kept. `--target dense:a` wants another output: a
times the dense model's, on its own inputs X, and 1 - a times that of W on the inputs Xh that the pruned model gives,
whose Gram matrix Gh takes the place of G:

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


def inverse(H: Tensor, ridge: float) -> Tensor:
    """Return (H + ridge I)^-1, (in, in), of a positive definite H."""
    damped = H.clone()
    damped.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


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


def equations(problem: Problem, statistic: str = "hessian") -> Equations:
    """Return the equations of a layer, in float32 or better on the weight's device, never aliasing what it holds.

    statistic: the strips that G comes from; of another one than "hessian" the target is the layer's own output.
    UserError where the target is the dense model's and the statistic "cross" is missing.
    """
    weight, found = problem.weight, gram(problem, statistic)
    wanted, a = found, problem.dense_share
    if a and statistic == "hessian":
        wanted = found.lerp(_cross(problem).to(found), a)
    return Equations(weight.detach().to(found.dtype), found, wanted)


def gram(problem: Problem, statistic: str) -> Tensor:
    """Return G, (in, in), of a statistic in strips of 2 G, in float32 or better on the weight's device."""
    weight = problem.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return symmetric(problem.statistics[statistic].to(weight.device, dtype), weight.shape[1]).div_(2)


def _cross(problem: Problem) -> Tensor:
    if "cross" not in problem.statistics:
        raise UserError(f"layer {problem.name!r}: --target dense needs the inputs of the dense model")
    return problem.statistics["cross"]


def relative_error(problem: Problem, updated: Tensor, damp: float) -> float:
    """Return E(B) / E(0), of `squared_error`; 0 where nothing is wanted."""
    error, size = squared_error(problem, updated, damp)
    return error / size if size > 0 else 0.0


def squared_error(problem: Problem, updated: Tensor, damp: float) -> tuple[float, float]:
    """Return E(B) and E(0) of a layer's updated weights, (out, in), with H damped: the error of the output that is
    wanted, and its size. With the dense target the statistic "dense_hessian" is needed too.
    """
    layer = equations(problem)
    lam, W, B = layer.ridge(damp), layer.weight, updated.to(layer.weight.dtype)
    if layer.same:
        H = layer.matrix(lam)
        lost = W - B
        return max(_form(lost, H, lost), 0.0), _form(W, H, W)
    # The wanted output is W (a X + (1 - a) Xh)', and its own Gram matrix K has both inputs and their products.
    a, cross = problem.dense_share, problem.statistics["cross"].to(W)
    K = a * a * gram(problem, "dense_hessian") + (1 - a) ** 2 * layer.gram
    K += a * (1 - a) * (cross + cross.t())
    K.diagonal().add_(lam)
    C, H = layer.right(lam), layer.matrix(lam)
    size = _form(W, K, W)
    return max(size - 2 * float((C.double() * B.double()).sum()) + _form(B, H, B), 0.0), size


def _form(left: Tensor, H: Tensor, right: Tensor) -> float:
    """Return tr(left H right'), summed in float64."""
    return float(((left @ H).double() * right.double()).sum())
