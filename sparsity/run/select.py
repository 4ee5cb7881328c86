"""From scores to masks: each part of the model has a budget, an allocation shares it out, and the scope says what
competes within a layer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.selection import (
    Named,
    Scores,
    Threshold,
    check_finite,
    counts_by_name,
    keep,
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


def select(parts: Sequence[Budget], allocation: Allocation, scope: str) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Return the masks for each sparsity, (name, bool (out, in)), with exactly the budget of each part False.

    They are made while they are read, one layer at a time, in whatever order; the scores of a part are computed several
    times.
    """
    return chosen(shared(parts, allocation), scope)


Shared = list[tuple[Part, Contest, Sequence[Sparsity]]]


def shared(parts: Sequence[Budget], allocation: Allocation) -> Shared:
    """Return the contests of all parts, with the part and its sparsities."""
    return [(part, contest, shares) for part, shares in parts for contest in allocation.contests(part, shares)]


def chosen(contests: Shared, scope: str) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Return the masks for each sparsity, as `select` does, of contests that are there."""
    found = [(part, contest, shares, _limits(part, contest, scope)) for part, contest, shares in contests]

    def of(i: int) -> Iterator[tuple[str, Tensor]]:
        for part, contest, shares, limits in found:
            yield from _keep(part, contest, scope, contest.counts[i], shares[i], limits[i] if limits else None)

    return (of(i) for i in range(len(contests[0][2])))


def _limits(part: Part, contest: Contest, scope: str) -> list[Threshold] | None:
    """One threshold for each sparsity, where whole layers compete."""
    return thresholds(_source(part, contest.names), contest.counts) if scope == "layer" else None


def _source(part: Part, names: Sequence[str]) -> Scores[str]:
    """The scores of a contest: computed once for a single layer, again at each pass for several."""
    return dict(part.scores(names)) if len(names) == 1 else partial(part.scores, names)


def _keep(
    part: Part, contest: Contest, scope: str, count: int, share: Sparsity, limit: Threshold | None
) -> Iterator[tuple[str, Tensor]]:
    if limit:
        yield from keep(partial(part.scores, contest.names), limit)
    elif contest.even:
        for name, score in part.scores(contest.names):
            yield name, keep_within(name, score, scope, partial(budget, share))
    else:
        source = _source(part, contest.names)
        single = len(contest.names) == 1
        lost = {contest.names[0]: count} if single else counts_by_name(source, [count])[0]
        for name, score in part.scores(contest.names):
            check_finite(name, score)
            yield name, keep_exactly(name, score, scope, lost[name])


@dataclass(frozen=True)
class Quota:
    """How many weights a layer loses by itself. share: of each unit of the scope, where every unit loses the same."""

    count: int
    share: Sparsity | None

    def keep(self, name: str, score: Tensor, scope: str) -> Tensor:
        """Return what is kept of the layer, bool (out, in)."""
        if self.share is None:
            return keep_exactly(name, score, scope, self.count)
        return keep_within(name, score, scope, partial(budget, self.share))


def quotas(contests: Shared) -> dict[str, Quota]:
    """Return name -> quota, from the contests for one sparsity of an allocation that is local."""
    return {
        name: Quota(contest.counts[0], shares[0] if contest.even else None)
        for _, contest, shares in contests
        for name in contest.names
    }


def follow(pattern: NM, scores: Named) -> Iterator[tuple[str, Tensor]]:
    """Return N:M masks; layers whose inputs M does not divide stay dense."""
    for name, score in scores:
        yield name, keep_pattern(pattern, name, score)
