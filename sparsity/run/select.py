"""From scores to masks: each part of the model has a budget, an allocation shares it out, and the scope says what
competes within a layer.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsity.allocation.base import LAYER_ERRORS, Allocation, Contest, Part, by_groups
from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.allocation.ratios import check_bounds, rounded, spread, total_of
from sparsity.allocation.ratios import limits as bounds_of
from sparsity.errors import UserError
from sparsity.pattern import NM, Block
from sparsity.selection import (
    SELECTION,
    Keeper,
    Named,
    Scores,
    check_finite,
    counts_by_name,
    keep_exactly,
    keep_pattern,
    keep_units,
    keep_within,
    pruned_before,
    thresholds,
    units_of,
)
from sparsity.view import PrunableView

if TYPE_CHECKING:
    from sparsity.run.plan import Plan
    from sparsity.run.request import Request

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


def parts_of(
    whole: Part, sparsities: Sequence[Sparsity], groups: Mapping[str, Sparsity], *, within_groups: bool = False
) -> list[Budget]:
    """Return the parts of a model as `budgets` does, with sparsities of at least what they have lost already.

    within_groups: each modality is a part of its own, with the same sparsities as the others of its part.
    """
    parts = budgets(whole, sparsities, groups)
    return _at_least([(own, shares) for part, shares in parts for own in by_groups(part)] if within_groups else parts)


def _at_least(parts: Sequence[Budget]) -> list[Budget]:
    """Return the parts with sparsities that are not below what they have lost already: the first of several steps may
    be asked for less than a mask that is there.
    """
    raised: list[Budget] = []
    for part, shares in parts:
        gone = sum(part.pruned.get(name, 0) for name in part.names)
        lowest = Fraction(gone, part.numel)
        raised.append((part, [share if budget(share, part.numel) >= gone else lowest for share in shares]))
    return raised


def check_budgets(parts: Sequence[Budget], sparsities: Sequence[Sparsity], groups: Mapping[str, Sparsity]) -> None:
    """Raise UserError for a budget that the bounds of its layers forbid. Warn where all parts together come to another
    sparsity than what is asked for, as far as two decimals of a per cent: groups that are all named decide.
    """
    for part, shares in parts:
        bounds = bounds_of(part)
        for share in shares:
            total_of(part, share, bounds)
    numel = sum(part.numel for part, _ in parts)
    for i, sparsity in enumerate(sparsities if groups else ()):
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
            kept = keep_exactly(name, score, self.scope, self.count)
        else:
            kept = keep_within(name, score, self.scope, partial(budget, self.share))
        revived = kept & pruned_before(score)
        return keep_unevenly(name, score, self.scope, count_of(~kept)) if revived.any() else kept


def keep_unevenly(name: str, score: Tensor, scope: str, count: int) -> Tensor:
    """Return what is kept, bool (out, in), of a layer that loses exactly `count` weights, where some rows or blocks
    have lost more than an even share before: they lose no more, and the others share out the rest in proportion to
    their size. Raises UserError where the layer has lost more than that.
    """
    units = units_of(score, scope)
    gone = [count_of(pruned_before(unit)) for unit in units]
    sizes = [unit.numel() for unit in units]
    if sum(gone) > count:
        raise UserError(f"layer {name!r} has lost {sum(gone)} weights before, more than the {count} that it is to lose")
    counts = rounded(spread(count, [Fraction(size) for size in sizes], gone, sizes), count)
    return keep_units(name, score, scope, counts)


def count_of(true: Tensor) -> int:
    """Return how many of a bool tensor are True."""
    return int(true.count_nonzero())


def quotas(contests: Shared, scope: str, block: Block | None = None) -> dict[str, Quota]:
    """Return name -> quota, of weights or of blocks, from the contests of a local allocation for one sparsity."""
    return {
        name: Quota(contest.counts[0], shares[0] if contest.even else None, scope)
        for _, contest, shares in in_blocks(contests, block)
        for name in contest.names
    }


def follow(pattern: NM, scores: Named) -> Iterator[tuple[str, Tensor]]:
    """Return N:M masks; layers whose inputs M does not divide stay dense."""
    for name, score in scores:
        yield name, keep_pattern(pattern, name, score)


# Blocks of weights that are pruned as one: allocations share out weights, selection compares blocks. Layers that
# compete lose as many blocks as there are in the weights that they are to lose. Where an allocation says what each
# layer loses, that is rounded to whole blocks so that the layers of a part lose as many as there are in their sum;
# where every layer loses the same share, it is that share of its blocks, rounded down.


def check_blocks(plan: "Plan", request: "Request") -> None:
    """Raise UserError where blocks of weights are asked for, and a plan cannot prune them."""
    block = request.block
    if block is None:
        return
    if plan.whole:
        raise UserError(f"--pattern {block}: {plan.name} chooses single weights of the whole model: leave it out")
    if plan.swaps:
        raise UserError(f"--swaps exchanges single weights, and --pattern {block} prunes blocks: leave one out")
    if plan.scope == "block" and not plan.joint(request):
        raise UserError(f"--scope block compares single weights: with --pattern {block} take --scope layer or row")
    if plan.scope == "block" and SELECTION % block.columns:
        raise UserError(f"--pattern {block}: its columns must divide the {SELECTION} of --scope block")


def chosen_of(view: PrunableView, contests: Shared, scope: str, block: Block | None, number: int = 1) -> Kept:
    """Return the masks of weights, as `sparsity.run.select.chosen` does, of whole blocks where they are asked for.
    number: of sparsities.
    """
    kept = chosen(in_blocks(contests, block), scope)
    return kept if block is None else _of_weights(view, kept, block, number)


def in_blocks(contests: Shared, block: Block | None) -> Shared:
    """Return the contests with blocks in place of weights, in their counts and in their scores. Every layer divides
    into blocks. None: of single weights, they stay as they are.
    """
    if block is None:
        return contests
    alone: dict[int, list[Contest]] = {}  # of each part, the layers that are told what they lose
    for part, contest, _ in contests:
        if len(contest.names) == 1 and not contest.even:
            alone.setdefault(id(part), []).append(contest)
    rounded: dict[int, list[int]] = {}
    for each in alone.values():
        counts = [_whole_blocks(wanted, block) for wanted in zip(*(contest.counts for contest in each), strict=True)]
        rounded |= {id(contest): list(own) for contest, own in zip(each, zip(*counts, strict=True), strict=True)}
    found: Shared = []
    for part, contest, shares in contests:
        numel = sum(part.view.weights[name].numel for name in contest.names)
        counts = rounded.get(id(contest)) or [count // block.numel for count in contest.counts]
        if contest.even:
            counts = [budget(share, numel // block.numel) for share in shares]
        scores = _scores_of_blocks(part.scores, block)
        found.append((replace(part, scores=scores), Contest(contest.names, counts, contest.even), shares))
    return found


def _of_weights(view: PrunableView, kept: Kept, block: Block, number: int) -> Kept:
    """Return masks of weights, (name, bool (out, in) for each sparsity), from those of blocks; layers that have none
    stay dense.
    """
    left = dict.fromkeys(view.weights)
    for name, masks in kept:
        del left[name]
        yield name, [block.expand(mask) for mask in masks]
    for name in left:
        yield name, [torch.ones_like(view.weights[name].matrix(), dtype=torch.bool)] * number


def _scores_of_blocks(
    scores: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]], block: Block
) -> Callable[[Sequence[str]], Named]:
    def reduced(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name, score in scores(names):
            check_finite(name, score)
            yield name, block.reduce(score)

    return reduced


def _whole_blocks(counts: Sequence[int], block: Block) -> list[int]:
    """Return counts of weights as counts of blocks, by largest remainder: of equal remainders the first."""
    parts = [divmod(count, block.numel) for count in counts]
    left = sum(counts) // block.numel - sum(whole for whole, _ in parts)
    first = set(sorted(range(len(parts)), key=lambda i: (-parts[i][1], i))[:left])
    return [whole + (i in first) for i, (whole, _) in enumerate(parts)]


def check_allocation(plan: "Plan") -> None:
    """Raise UserError for bounds, and for what an allocation measures, that the plan cannot have."""
    check_bounds(plan.min_keep, plan.max_keep)
    if plan.whole:
        for option in plan.bounds:
            raise UserError(f"{plan.name} decides by itself how many weights each block keeps: leave --{option} out")
    if plan.learned and LAYER_ERRORS in plan.allocation.statistics:
        raise UserError(
            f"--allocation error measures what the masks of a layer cost, and {plan.name} learns its scores for the"
            " layers' shares: take another allocation"
        )
    if plan.learned and plan.allocation.by_scores and {"min_keep", "max_keep"} & set(plan.bounds):
        raise UserError(
            f"--allocation {plan.allocation.name}: {plan.name} learns its scores for what each layer loses, and they"
            " would decide that: leave --min_keep and --max_keep out, or take another allocation"
        )
    if plan.steps > 1 and "max_keep" in plan.bounds:
        raise UserError("--max_keep: the first of several steps prunes less than that of each layer: leave it out")


def check_target(plan: "Plan") -> None:
    """Raise UserError for a dense target that the plan cannot have."""
    solver = plan.reconstruction
    if not plan.dense_share or solver is None:
        return
    if "dense" not in solver.targets:
        raise UserError(f"--target dense: {solver.name} knows no target but the layer's own output: leave it out")
    if not plan.sequential:
        raise UserError("--target dense is for sequential calibration: in dense calibration it is the same as none")
    if plan.steps > 1:
        raise UserError("--target dense needs --epochs 1: after the first step the model is not dense any more")


def check_block_steps(plan: "Plan") -> None:
    """Raise UserError for block steps that the plan cannot have."""
    if not plan.block_steps:
        return
    if plan.whole:
        raise UserError(f"--block_steps: {plan.name} solves all blocks together: leave it out")
    if not plan.sequential:
        how = "--calibration_mode sequential" if plan.of_inputs else "--reconstruct lsq"
        raise UserError(f"--block_steps trains block by block, which {plan.name} is not pruned here: give {how}")
    if plan.calibrate_within != "block":
        raise UserError("--block_steps trains whole blocks: leave --calibrate_within out")
    if plan.steps > 1:
        raise UserError("--block_steps needs --epochs 1: after the first step the model is not dense any more")
