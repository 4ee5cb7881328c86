"""Least squares on the weights that are kept, the optimum for a given mask: the last step of ALPS, arXiv 2406.07831."""

from torch import Tensor

from sparsity.reconstruction.base import Problem, Reconstruction, check_mask, check_problem, check_rounds
from sparsity.reconstruction.damping import Damp, check_damp, damping
from sparsity.reconstruction.equations import equations
from sparsity.selection import check_finite
from sparsity.solvers.conjugate import least_squares
from sparsity.statistics.hessian import DAMPING


class LeastSquares(Reconstruction):
    """The weights that give the smallest error of the layer's output for a given mask: b_S = H_SS^-1 C_S in each row.

    damp: lambda over the mean of G's diagonal; the ridge pulls towards W. rounds: at most, of conjugate gradients.
    """

    targets = ("same", "dense")

    def __init__(self, damp: Damp = DAMPING, rounds: int = 100):
        self.damp, self.rounds = check_damp(damp), check_rounds(rounds)

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return the mask of the problem and the weights. UserError for a problem that it does not take."""
        check_problem(self, problem)
        kept = check_mask(problem)
        layer = equations(problem)
        ridge = layer.ridge(damping(self.damp, problem))
        target = None if layer.same else layer.right(ridge)
        updated = least_squares(layer.weight, layer.matrix(ridge), kept, target, steps=self.rounds)
        updated = updated.to(problem.weight.dtype)
        check_finite(problem.name, updated)
        return kept, updated
