"""SparseGPT, arXiv 2301.00774: which weights of a layer are pruned, and what the others become.

Columns are swept from left to right. A weight w_ij goes where its saliency w_ij^2 / U_jj^2 is low among its selection
group: M consecutive columns of its row (N:M), or `SELECTION` columns over all rows. The error of what goes,
e_j = (w_j - q_j) / U_jj, is compensated in the columns to the right: W_k -= e_j U_jk.

U = R^-1 is never computed. Weights are scaled to v_j = w_j / U_jj, so that v_j^2 is the saliency and e_j = v_j for what
goes; and R's rows are divided by its diagonal, S. With D = V - Q, the original weights less the final ones, the
definition of e gives D S = E. So when the sweep reaches columns G after the columns P before them, their compensated
weights are

    V_G + D_P S_PG S_GG^-1,

and within G, V_k -= e_j (S_GG^-1)_jk: all that is inverted is a small unit triangle.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity, budget
from sparsity.pattern import NM, Block
from sparsity.reconstruction.base import Problem, Reconstruction, check_problem
from sparsity.reconstruction.damping import Damp, check_damp, damping
from sparsity.selection import SELECTION, BlockChoice, GroupChoice, check_finite
from sparsity.statistics.hessian import DAMPING, Factor, factor

_COMPUTED = 128  # columns whose compensation from the left comes from one matrix product
_Choice = Callable[[Tensor, Tensor], None]  # scores (columns, out), and what it fills: 1 where a weight goes
_TOGETHER, _SWEPT = 16, 8  # a selection group of so many columns is swept as one, a larger one in parts


def saliency(weight: Tensor, factor: Factor) -> Tensor:
    """w^2 / U_jj^2, (out, in), of the weights as they are: the closed form of a sweep that compensates nothing. Columns
    whose input was always zero score 0.
    """
    return (weight * (factor.diagonal * factor.live)).square_()


def reconstruct(
    weight: Tensor,
    factor: Factor,
    sparsity: Sparsity | None,
    pattern: NM | None = None,
    *,
    block: Block | None = None,
    computed: int = _COMPUTED,
) -> tuple[Tensor, Tensor]:
    """Which weights (out, in) are kept, bool, and what they become, in the weight's own dtype.

    sparsity: of each `SELECTION` columns over all rows; or a pattern, whose M divides the columns. block: weights
    are pruned in blocks, by their sums of saliencies; sparsity is that of blocks, whose columns divide `SELECTION`.
    computed: columns of a compute block, which changes nothing but rounding.
    """
    if pattern:
        choice: _Choice = GroupChoice(pattern, factor.turned)
        sweep = _Sweep(weight, factor, choice, pattern.m, pattern.m - pattern.n)
    else:
        assert sparsity is not None, "without a pattern there is a sparsity"
        sweep = _Sweep(weight, factor, BlockChoice(factor.name, partial(budget, sparsity), block), SELECTION, SELECTION)
    kept, updated = sweep.run(computed)
    check_finite(factor.name, updated)
    return kept, updated


def reconstruct_given(
    weight: Tensor, factor: Factor, kept: Tensor, pattern: NM | None = None, *, computed: int = _COMPUTED
) -> Tensor:
    """Return what the weights become in the same sweep when the mask is given, in the weight's own dtype.

    kept: (out, in), bool, any mask. pattern: by whose groups the columns are swept, as `reconstruct` does: with the
    mask and the pattern of its own, its very weights.
    """
    group, most = SELECTION, SELECTION
    if pattern and pattern.fits(weight.shape[1]):
        group = pattern.m
        most = max(1, int((~kept).unflatten(1, (-1, group)).sum(dim=-1).amax()))
    _, updated = _Sweep(weight, factor, _Given(kept, group), group, most).run(computed)
    check_finite(factor.name, updated)
    return updated


class SparseGPT(Reconstruction):
    """SparseGPT's column sweep, arXiv 2301.00774, algorithm 1: with a mask given, or finding it on the way, within
    blocks of 128 columns or of an N:M pattern.

    damp: of the mean of H's diagonal over live columns, added to the diagonal.
    """

    scopes = ("block",)

    def __init__(self, damp: Damp = DAMPING):
        self.damp = check_damp(damp)

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return kept, (out, in) bool, and the weights. UserError for a problem that it does not take."""
        check_problem(self, problem)
        weight = problem.weight
        hessian = problem.statistics["hessian"].to(weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        found = factor(hessian, weight.shape[1], problem.name, dtype, damping(self.damp, problem))
        if problem.kept is None:
            sparsity = None if problem.pattern else problem.sparsity
            return reconstruct(weight, found, sparsity, problem.pattern, block=problem.block)
        return problem.kept, reconstruct_given(weight, found, problem.kept, problem.pattern)


class _Given:
    """Takes what a mask (out, in) prunes from one group of columns after the other."""

    def __init__(self, kept: Tensor, group: int):
        self._gone = iter((~kept).t().split(group))

    def __call__(self, scores: Tensor, gone: Tensor) -> None:
        """Fills `gone`, 1 where a weight goes and 0 elsewhere, (columns, out)."""
        gone.copy_(next(self._gone))


class _Sweep:
    """group: columns of a selection group, of which at most `most` of a row go. What is allocated once here would else
    be allocated for each group.
    """

    def __init__(self, weight: Tensor, factor: Factor, choice: _Choice, group: int, most: int):
        self.weight, self.factor, self.choice = weight, factor, choice
        self.group, self.swept = group, group if group <= _TOGETHER else _SWEPT
        self.rounds = min(most, self.swept) - 1
        self._room = [factor.turned.new_empty(group, len(weight)) for _ in range(4)]

    def run(self, computed: int) -> tuple[Tensor, Tensor]:
        """Kept (out, in), bool, and the updated weights."""
        scale, columns = self.factor.diagonal[:, None], max(1, computed // self.group) * self.group
        weight = self.weight.t().to(scale.dtype, copy=True, memory_format=torch.contiguous_format)
        kept, changed = torch.empty_like(weight, dtype=torch.bool), torch.empty_like(weight)  # changed: D^T
        for start in range(0, len(weight), columns):
            here = slice(start, min(start + columns, len(weight)))
            before = weight[here].mul_(scale[here] * self.factor.live[here, None])  # V^T: a column of W is contiguous
            unit = self.factor.unit(here)  # S, (here.stop, columns)
            left = unit[:start].t() @ changed[:start]  # (columns, out): (D S)^T of the columns before
            gone = torch.empty_like(before)
            self._block(before, left, unit[start:], changed[here], gone)
            torch.eq(gone, 0, out=kept[here])
            before.sub_(changed[here]).div_(scale[here]).mul_(kept[here])
        updated = weight.t().to(self.weight.dtype, copy=True, memory_format=torch.contiguous_format)
        return kept.t().contiguous(), updated

    def _block(self, before: Tensor, left: Tensor, unit: Tensor, changed: Tensor, gone: Tensor) -> None:
        """Fills `changed` and `gone` (columns, out). unit: S of these columns alone."""
        eye = torch.eye(len(unit)).to(unit)
        # S^-T: its diagonal blocks are those of the groups.
        inverse = torch.linalg.solve_triangular(unit, eye, upper=True, unitriangular=True).t().contiguous()
        below = inverse.tril(-1)
        for first in range(0, len(before), self.group):
            group = slice(first, min(first + self.group, len(before)))
            if first:
                left[group].addmm_(unit[:first, group].t(), changed[:first])
            if self.swept < self.group:
                self._choose(before[group], left[group], inverse[group, group], gone[group])
            for start in range(first, group.stop, self.swept):
                part = slice(start, min(start + self.swept, group.stop))
                if start > first:
                    left[part].addmm_(unit[first:start, part].t(), changed[first:start])
                triangle, taken = inverse[part, part], gone[part]
                look = self._ahead if self.swept < self.group else self._choose
                ahead, moved = look(before[part], left[part], triangle, taken)
                errors = self._errors(ahead, taken, below[part, part])
                torch.addmm(moved, triangle, errors, beta=-1, out=changed[part])  # D S = E, solved for D

    def _choose(self, before: Tensor, left: Tensor, triangle: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        """Fills `gone` of a selection group; returns what `_ahead` does."""
        ahead, moved = self._ahead(before, left, triangle, gone)
        self.choice(torch.abs(ahead, out=self._empty(2, len(ahead))), gone)
        return ahead, moved

    def _ahead(self, before: Tensor, left: Tensor, triangle: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (columns, out) compensated for all columns before them, and by how much."""
        moved = torch.mm(triangle, left, out=self._empty(0, len(before)))
        return torch.add(before, moved, out=self._empty(1, len(before))), moved

    def _errors(self, ahead: Tensor, gone: Tensor, below: Tensor) -> Tensor:
        """E^T of columns that are swept together: the weights that go, compensated for those before them.

        An error depends on those of its row that come before it: as many rounds as there can be of them give all.
        below: S^-T below its diagonal.
        """
        errors = torch.mul(ahead, gone, out=self._empty(2, len(ahead)))
        for _ in range(self.rounds):
            compensated = torch.addmm(ahead, below, errors, alpha=-1, out=self._empty(3, len(ahead)))
            torch.mul(compensated, gone, out=errors)
        return errors

    def _empty(self, number: int, columns: int) -> Tensor:
        room = self._room[number]
        return room if len(room) == columns else room[:columns]
