"""The nearest legal mask: what solvers that find one by themselves project on, again and again."""

from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.reconstruction.base import Problem
from sparsity.selection import SELECTION, keep_exactly, keep_rows, keep_within, lowered


def project(problem: Problem, scores: Tensor) -> Tensor:
    """Return the mask, (out, in) bool, that a problem allows with the largest scores (out, in): of its N:M pattern, or
    exactly its sparsity, or its count, within its scope; what is not alive is pruned first. Of magnitudes that is the
    nearest legal mask: blocks of weights are compared by their sums of squares.
    """
    return project_gently(problem, scores, Fraction(1))


def project_gently(problem: Problem, scores: Tensor, share: Fraction) -> Tensor:
    """Return a mask that prunes this share of what the problem asks for. N:M: the N largest of each group are kept, and
    of the rest as many as there is room for, compared within the scope.
    """
    alive, width, block = problem.alive, SELECTION, problem.block
    if block:
        scores, width = block.reduce(scores.square()), SELECTION // block.columns
        alive = None if alive is None else block.reduce(alive.float()) > 0
    if alive is not None:
        scores = lowered(scores, alive)
    if problem.pattern is None:
        if problem.count is not None:
            kept = keep_exactly(problem.name, scores, problem.scope, int(problem.count * share), width)
        else:
            assert problem.sparsity is not None, "without a pattern there is a sparsity, or a count"
            kept = _keep(problem, scores, problem.sparsity if share == 1 else fraction(problem.sparsity) * share, width)
        return block.expand(kept) if block else kept
    if share == 1:
        return problem.pattern.keep(scores)
    last = torch.finfo(scores.dtype).max
    return _keep(problem, scores.masked_fill(problem.pattern.keep(scores), last), problem.pattern.sparsity * share)


def _keep(problem: Problem, scores: Tensor, sparsity: Sparsity, width: int = SELECTION) -> Tensor:
    if problem.scope == "row":
        counts = torch.full((len(scores),), budget(sparsity, scores.shape[1]))
        return keep_rows(problem.name, scores, counts.to(scores.device))  # a count each: the faster way
    return keep_within(problem.name, scores, problem.scope, partial(budget, sparsity), width)
