"""The nearest legal mask: what solvers that find one by themselves project on, again and again."""

from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.reconstruction.base import Problem
from sparsity.selection import SELECTION, keep_rows, keep_within


def project(problem: Problem, scores: Tensor) -> Tensor:
    """Return the mask, (out, in) bool, that a problem allows with the largest scores (out, in): of its N:M pattern, or
    exactly its sparsity within its scope. Of magnitudes that is the nearest legal one: blocks of weights are compared
    by their sums of squares.
    """
    if problem.pattern:
        return problem.pattern.keep(scores)
    assert problem.sparsity is not None, "without a pattern there is a sparsity"
    return _keep(problem, scores, problem.sparsity)


def project_gently(problem: Problem, scores: Tensor, share: Fraction) -> Tensor:
    """Return a mask that prunes this share of what the problem asks for. N:M: the N largest of each group are kept, and
    of the rest as many as there is room for, compared within the scope.
    """
    if problem.pattern is None:
        assert problem.sparsity is not None, "without a pattern there is a sparsity"
        return _keep(problem, scores, _share_of(problem.sparsity, share))
    if share == 1:
        return problem.pattern.keep(scores)
    last = torch.finfo(scores.dtype).max
    return _keep(problem, scores.masked_fill(problem.pattern.keep(scores), last), problem.pattern.sparsity * share)


def _share_of(sparsity: Sparsity, share: Fraction) -> Sparsity:
    return sparsity if share == 1 else fraction(sparsity) * share


def _keep(problem: Problem, scores: Tensor, sparsity: Sparsity) -> Tensor:
    if problem.block:
        blocks, width = problem.block.reduce(scores.square()), SELECTION // problem.block.columns
        kept = keep_within(problem.name, blocks, problem.scope, partial(budget, sparsity), width)
        return problem.block.expand(kept)
    if problem.scope == "row":
        counts = torch.full((len(scores),), budget(sparsity, scores.shape[1]))
        return keep_rows(problem.name, scores, counts.to(scores.device))  # a count each: the faster way
    return keep_within(problem.name, scores, problem.scope, partial(budget, sparsity))
