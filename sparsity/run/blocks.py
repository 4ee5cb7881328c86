"""Blocks of weights that are pruned as one: allocations share out weights, selection compares blocks.

Layers that compete lose as many blocks as there are in the weights that they are to lose. Where an allocation says what
each layer loses, that is rounded to whole blocks so that the layers of a part lose as many as there are in their sum;
where every layer loses the same share, it is that share of its blocks, rounded down.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsity.allocation.base import Contest
from sparsity.allocation.budget import budget
from sparsity.pattern import Block
from sparsity.run.select import Kept, Shared
from sparsity.selection import Named, check_finite
from sparsity.view import PrunableView


def in_blocks(contests: Shared, block: Block) -> Shared:
    """Return the contests with blocks in place of weights, in their counts and in their scores. Every layer divides
    into blocks.
    """
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


def of_weights(view: PrunableView, kept: Kept, block: Block, number: int = 1) -> Kept:
    """Return masks of weights, (name, bool (out, in) for each sparsity), from those of blocks; layers that have none
    stay dense. number: of sparsities.
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
