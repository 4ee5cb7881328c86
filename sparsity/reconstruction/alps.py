"""ALPS, arXiv 2406.07831: the mask and the weights by alternating directions, then least squares on that mask.

The layer is scaled so that H has a unit diagonal: with d = sqrt(diag H), W <- W d, H <- D^-1 H D^-1, C <- C / d. Two
copies of the weights are drawn together by a multiplier Y and a penalty rho that grows: B has the least error without a
mask,

    B = (C - Y + rho D) (H + rho I)^-1,    D = projection of B + Y / rho,    Y += rho (B - D),

and D keeps the mask. rho changes every third round only: the inverse is formed then, which takes less than going
through the eigenvectors of H, with two products instead of one, in each round.
"""

import torch
from torch import Tensor

from sparsity.pattern import SCOPES
from sparsity.reconstruction.base import Problem, Reconstruction, check_problem, check_rounds
from sparsity.reconstruction.damping import Damp, check_damp, damping
from sparsity.reconstruction.equations import equations, inverse
from sparsity.reconstruction.projection import project
from sparsity.selection import check_finite
from sparsity.solvers.conjugate import least_squares
from sparsity.statistics.hessian import DAMPING

_PENALTY = 0.1  # the first rho
_CHECKED = 3  # rounds between two looks at how much of the support has changed
_SETTLED = 3e-4  # of the support


class ALPS(Reconstruction):
    """ALPS, arXiv 2406.07831, algorithm 1: finds mask and weights; of a mask that is given, the weights alone, by its
    last step. The error need not fall from round to round.

    damp: lambda over the mean of G's diagonal; the ridge pulls towards W. rounds: at most.
    """

    scopes, projects = SCOPES, True
    targets = ("same", "dense")

    def __init__(self, damp: Damp = DAMPING, rounds: int = 300):
        self.damp, self.rounds = check_damp(damp), check_rounds(rounds)

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return kept, (out, in) bool, and the weights. UserError for a problem that it does not take."""
        check_problem(self, problem)
        layer = equations(problem)
        ridge = layer.ridge(damping(self.damp, problem))
        H, C = layer.matrix(ridge), layer.right(ridge)
        kept, start = problem.kept, None
        if kept is None:
            scale = H.diagonal().sqrt()
            scaled = H / scale / scale[:, None]
            kept, D = _alternate(problem, layer.weight * scale, scaled, C / scale, self.rounds)
            start = D.div_(scale)
        updated = least_squares(layer.weight, H, kept, None if layer.same else C, start).to(problem.weight.dtype)
        check_finite(problem.name, updated)
        return kept, updated


def _alternate(problem: Problem, W: Tensor, H: Tensor, C: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the mask of the last D, and D, (out, in) both, of a layer that is scaled."""
    support = kept = project(problem, W.abs())
    D, Y, rho = W * kept, torch.zeros_like(W), _PENALTY
    solution = inverse(H, rho)
    for number in range(1, rounds + 1):
        B = torch.add(C, D, alpha=rho).sub_(Y) @ solution
        moved = torch.add(B, Y, alpha=1 / rho)
        kept = project(problem, moved.abs())
        D = moved.mul_(kept)
        Y.add_(B.sub_(D), alpha=rho)
        if number % _CHECKED == 0:
            changed = float((kept ^ support).count_nonzero() / kept.count_nonzero().clamp(min=1))
            if changed < _SETTLED:
                break
            support = kept
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            solution = inverse(H, rho)
    return kept, D
