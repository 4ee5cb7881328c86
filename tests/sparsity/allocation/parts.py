"""Parts of toy models, for the tests of allocations."""

from typing import Any

from sparsity.allocation.base import Allocation, Part
from sparsity.view import PrunableView


def part_of(view: PrunableView, **fields: Any) -> Part:
    """All weights of a view; asking for scores is an error."""
    return Part(view, list(view.weights), no_scores, **fields)


def no_scores(names):
    raise AssertionError("this allocation needs no scores of the plan")


def counts(allocation: Allocation, part: Part, *sparsities: Any) -> list[dict[str, int]]:
    """For each sparsity, name -> how many weights are pruned; each layer has a contest of its own."""
    contests = allocation.contests(part, sparsities)
    assert [contest.names for contest in contests] == [[name] for name in part.names]
    assert not any(contest.even for contest in contests)
    return [{contest.names[0]: contest.counts[i] for contest in contests} for i in range(len(sparsities))]
