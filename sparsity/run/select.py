"""From scores to masks: each part of the model has a budget, an allocation shares it out, and the scope says what
competes within a layer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.selection import (
    Keeper,
    Named,
    Scores,
    check_finite,
    counts_by_name,
    keep_exactly,
    keep_pattern,
    keep_within,
    thresholds,
)

logger = logging.getLogger(__name__)

Budget = tuple[Part, Sequence[Sparsity]]


def budgets(whole: Part, sparsities: Sequence[Sparsity], groups: Mapping[str, Sparsity]) -> list[Budget]:
    """Return the parts of a model with the sparsities of each.

    groups: modalities with a sparsity of their own, which is a part each; the other weights are one part, that loses
    what is left of the budget. Where every modality is named, they decide. UserError for a modality that the model does
    not have, and for budgets that cannot be.
    """
    if not groups:
        return [(whole, sparsities)]
    members = whole.view.groups
    for group in groups:
        if group not in members:
            raise UserError(f"--group_sparsity {group}: the model has the groups {', '.join(members)}")
    inside = [name for group in groups for name in members[group]]
    rest = replace(whole, names=[name for name in whole.names if name not in inside])
    given: list[Budget] = []
    for group, share in groups.items():
        names = [name for name in members[group] if name in whole.names]
        given.append((replace(whole, names=names), [share] * len(sparsities)))
    lost = sum(budget(shares[0], part.numel) for part, shares in given)
    if not rest.names:
        return given
    shares = [_rest(sparsity, whole.numel, lost, rest.numel) for sparsity in sparsities]
    return [*given, (rest, shares)]


def warn_of_sum(parts: Sequence[Budget], sparsities: Sequence[Sparsity], numel: int) -> None:
    """Warn where all parts together come to another sparsity than what is asked for, as far as two decimals of a per
    cent: groups that are all named decide.
    """
    for i, sparsity in enumerate(sparsities):
        lost = sum(budget(shares[i], part.numel) for part, shares in parts)
        if abs(lost - budget(sparsity, numel)) > numel / 10_000:
            told = "--group_sparsity names every group, and they come to %.4g %% of all weights, not to %.4g %%"
            logger.warning(told, 100 * lost / numel, 100 * float(fraction(sparsity)))


def _rest(sparsity: Sparsity, numel: int, lost: int, rest: int) -> Fraction:
    left = budget(sparsity, numel) - lost
    if not 0 <= left < rest:
        raise UserError(
            f"--group_sparsity: the groups lose {lost} of {numel} weights, which leaves {left} for the other {rest} at"
            f" {100 * float(fraction(sparsity)):.4g} %"
        )
    return Fraction(left, rest)


Kept = Iterator[tuple[str, list[Tensor]]]


def select(parts: Sequence[Budget], allocation: Allocation, scope: str) -> Kept:
    """Return (name, what is kept for each sparsity, bool (out, in)) of every layer, with exactly the budget of each
    part pruned.

    They are made while they are read, one layer at a time, in whatever order; the scores of a part are computed several
    times, but once for the masks of all sparsities.
    """
    return chosen(shared(parts, allocation), scope)


Shared = list[tuple[Part, Contest, Sequence[Sparsity]]]


def shared(parts: Sequence[Budget], allocation: Allocation) -> Shared:
    """Return the contests of all parts, with the part and its sparsities."""
    return [(part, contest, shares) for part, shares in parts for contest in allocation.contests(part, shares)]


def chosen(contests: Shared, scope: str) -> Kept:
    """Return the masks for each sparsity, as `select` does, of contests that are there."""
    for part, contest, shares in contests:
        single = len(contest.names) == 1
        # Computed once for a single layer, again at each pass for several.
        source: Scores[str] = dict(part.scores(contest.names)) if single else partial(part.scores, contest.names)
        choices = _choices(contest, shares, scope, source)
        for name, score in source.items() if isinstance(source, Mapping) else source():
            yield name, [choose(name, score) for choose in choices]


def _choices(
    contest: Contest, shares: Sequence[Sparsity], scope: str, source: Scores[str]
) -> list[Callable[[str, Tensor], Tensor]]:
    """Return, for each sparsity, what turns the scores of one layer after the other into what is kept of it."""
    if scope == "layer":
        keepers = [Keeper(limit) for limit in thresholds(source, contest.counts)]
        return [lambda name, score, keeper=keeper: keeper(score) for keeper in keepers]
    if contest.even:
        return [Quota(count, share, scope).keep for count, share in zip(contest.counts, shares, strict=True)]
    if len(contest.names) == 1:
        return [Quota(count, None, scope).keep for count in contest.counts]
    lost = counts_by_name(source, contest.counts)
    return [lambda name, score, own=own: Quota(own[name], None, scope).keep(name, score) for own in lost]


@dataclass(frozen=True)
class Quota:
    """How many weights a layer loses by itself. share: of each unit of the scope, where every unit loses the same."""

    count: int
    share: Sparsity | None
    scope: str

    def keep(self, name: str, score: Tensor) -> Tensor:
        """Return what is kept of the layer, bool (out, in). Raises UserError, naming the layer, for NaN or Inf."""
        if self.share is None:
            check_finite(name, score)
            return keep_exactly(name, score, self.scope, self.count)
        return keep_within(name, score, self.scope, partial(budget, self.share))


def quotas(contests: Shared, scope: str) -> dict[str, Quota]:
    """Return name -> quota, from the contests for one sparsity of an allocation that is local."""
    return {
        name: Quota(contest.counts[0], shares[0] if contest.even else None, scope)
        for _, contest, shares in contests
        for name in contest.names
    }


def follow(pattern: NM, scores: Named) -> Iterator[tuple[str, Tensor]]:
    """Return N:M masks; layers whose inputs M does not divide stay dense."""
    for name, score in scores:
        yield name, keep_pattern(pattern, name, score)
