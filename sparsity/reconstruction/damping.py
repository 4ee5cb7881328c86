"""The damping of a layer's H: a number, or "auto", which is chosen on samples that are held out."""

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.equations import equations, gram
from sparsity.reconstruction.projection import project
from sparsity.solvers.conjugate import least_squares

AUTO = "auto"
Damp = float | str  # AUTO

CHOICES = (1e-3, 1e-2, 1e-1)
_ROWS = 256  # of a layer that is larger, so many are solved


def check_damp(damp: Damp) -> Damp:
    """Return the damping. UserError unless it is a number above 0, or "auto"."""
    if damp != AUTO and not (isinstance(damp, int | float) and 0 < damp < float("inf")):
        raise UserError(f"damp must be a number above 0, such as 0.01, or auto, got {damp!r:.60}")
    return damp


def damping(damp: Damp, problem: Problem) -> float:
    """Return the damping as a number; "auto" is chosen for this layer."""
    return choose_damp(problem) if isinstance(damp, str) else damp


def choose_damp(problem: Problem) -> float:
    """Return that of `CHOICES` whose least squares on part of the samples give the smallest error on the others.

    Statistics: "training" and "held_out", strips of (2 / n) X'X as "hessian", each over its own samples. The error is
    that of the layer's own output, without a ridge, over at most 256 rows, evenly spread. Where the problem has no
    mask, that of |w| ||X_j|| stands in. Of equal errors the smallest damping is chosen. UserError where a statistic is
    missing.
    """
    missing = {"training", "held_out"} - set(problem.statistics)
    if missing:
        raise UserError(f"layer {problem.name!r}: damp auto needs samples that are held out: give more than one")
    kept = problem.kept
    if kept is None:
        layer = equations(problem, "training")
        kept = project(problem, layer.weight.abs() * layer.gram.diagonal().sqrt())
    rows = sampled_rows(kept)
    return min(CHOICES, key=lambda damp: held_out_error(problem, kept, rows, damp)[0])


def sampled_rows(kept: Tensor) -> Tensor:
    """Return the indices of at most 256 rows of a layer, evenly spread."""
    outputs = len(kept)
    return torch.linspace(0, outputs - 1, min(_ROWS, outputs), device=kept.device).round().long()


def held_out_error(problem: Problem, kept: Tensor, rows: Tensor, damp: float) -> tuple[float, float]:
    """Return the error, on the samples that are held out, of some rows' least squares on the others, and that of the
    mask alone; both over the size of the output.
    """
    layer, held_out = equations(problem, "training"), gram(problem, "held_out")
    W, kept = layer.weight[rows], kept[rows]

    def size(lost: Tensor) -> float:
        return float(((lost @ held_out).double() * lost.double()).sum())

    solved = least_squares(W, layer.matrix(layer.ridge(damp)), kept)
    whole = size(W) or 1.0
    return size(W - solved) / whole, size(W * ~kept) / whole
