"""ADMM, arXiv 2401.02938: alternating directions with a fixed penalty, on a mask that is given or grows on the way."""

from fractions import Fraction

import torch
from torch import Tensor

from sparsity.pattern import SCOPES
from sparsity.reconstruction.base import Problem, Reconstruction, check_problem, check_rounds
from sparsity.reconstruction.damping import Damp, check_damp, damping
from sparsity.reconstruction.equations import equations, inverse
from sparsity.reconstruction.projection import project_gently
from sparsity.selection import check_finite
from sparsity.statistics.hessian import DAMPING

_PENALTY = 1.0  # rho


class ADMM(Reconstruction):
    """ADMM, arXiv 2401.02938, algorithm 1. The layer is scaled by d = sqrt(diag G): W <- W d, Gs = D^-1 G D^-1 + damp
    I. From U = 0 and V = W it repeats

        Z = (V + U) * M,    U += V - Z,    V = (W Gs + rho (Z - U)) (Gs + rho I)^-1,

    and the weights are Z / d. With a mask given they converge to those of least squares. With none, M keeps the largest
    of |V + U| at the sparsity s_t = s - s (1 - t / 15)^3 in round t, and is fixed from round 16 on.

    damp: of the unit diagonal of the scaled G; the ridge pulls towards W. Inputs that were always zero are not scaled.
    rounds: how many; a mask is sought in the first three quarters of them.
    """

    scopes, projects = SCOPES, True
    targets = ("same", "dense")

    def __init__(self, damp: Damp = DAMPING, rounds: int = 20):
        self.damp, self.rounds = check_damp(damp), check_rounds(rounds)

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return kept, (out, in) bool, and the weights. UserError for a problem that it does not take."""
        check_problem(self, problem)
        layer, damp = equations(problem), damping(self.damp, problem)
        squares = layer.gram.diagonal()
        squares = torch.where(squares > 0, squares, 1)
        scale = squares.sqrt()
        C = layer.right(damp * squares).div_(scale)  # W Gs, where the target is the layer's own output
        solution = inverse(layer.gram / scale / scale[:, None], damp + _PENALTY)
        V, U, Z, kept = layer.weight * scale, torch.zeros_like(C), torch.zeros_like(C), problem.kept
        grows = max(1, self.rounds * 3 // 4)
        for number in range(1, self.rounds + 1):
            U.add_(V)  # V + U
            if problem.kept is None and number <= grows:
                kept = project_gently(problem, U.abs(), 1 - (1 - Fraction(number, grows)) ** 3)
            assert kept is not None, "given, or found in the first round"
            torch.mul(U, kept, out=Z)
            U.sub_(Z)
            if number < self.rounds:
                V = torch.sub(Z, U).mul_(_PENALTY).add_(C) @ solution
        assert kept is not None
        updated = Z.div_(scale).to(problem.weight.dtype)
        check_finite(problem.name, updated)
        return kept, updated
