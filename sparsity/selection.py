"""Selection of the k lowest scores: the only place where a threshold is computed.

Exactly k go, also when scores tie: ties are pruned in prunable order, then row-major in the (out, in) view, lowest
index first.

Radix selection. A float is read as an integer that sorts like it, and a histogram of the top 14 bits tells in which
bucket the k-th lowest score lies. The next pass looks into that bucket only: at the scores themselves when they are
few, else at the next 14 bits, and so on (two passes; with many ties up to three for float32, five for float64). Scores
are seen tensor by tensor, in pieces: they are never put side by side, sorted or even held at once, and one histogram
serves any number of sparsities.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.pattern import NM, Block

Name = TypeVar("Name")  # of a weight, or of a part of one
Named = Iterable[tuple[str, Tensor]]
Lost = Callable[[int], int]  # of so many weights that compete, how many are pruned
# Held, or computed again for each pass.
Scores = Mapping[Name, Tensor] | Callable[[], Iterable[tuple[Name, Tensor]]]

# Scores looked at together. On the processor they stay in its cache, and below the size from which torch would share
# them between threads: waiting for each other in thousands of small operations costs more than it gains.
_PIECE = 1 << 15
_DIGIT = 14  # bits; the last digit has what is left
_BUCKETS = 1 << _DIGIT
_HALF = _BUCKETS // 2  # the top digit is signed
SELECTION = 128  # columns of a "block" pool
_COMPARED = 32  # in larger N:M groups, not all pairs of weights are compared at once
_FEW = 1 << 22  # so many keys are looked at themselves instead of counted
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Threshold:
    """Scores below `value` go, and the first `take` of the `ties` scores equal to it."""

    value: float
    take: int
    ties: int


NOTHING = Threshold(float("-inf"), 0, 0)


def thresholds(scores: Scores[Any], counts: Sequence[int]) -> list[Threshold]:
    """For each k in `counts`, the threshold below which the k lowest of all scores lie. Floating point, of one dtype.

    Raises UserError, naming the layer, for NaN or Inf.
    """
    searches = {k: _Search(rank=k) for k in counts if k > 0}
    if not searches:
        for _ in _keys(scores):  # NaN and Inf are errors all the same
            pass
    level, dtype = 0, None
    while searches and (dtype is None or _shift(dtype, level - 1) > 0):
        prefixes = {search.prefix: search.ties for search in searches.values()}
        few = level > 0 and all(search.ties <= _FEW for search in searches.values())
        found, dtype = (_gather if few else _histograms)(scores, prefixes, level)
        for search in searches.values():
            if few:
                search.finish(found[search.prefix])
            else:
                search.narrow(found[search.prefix], level, _width(dtype, level))
        if few:
            break
        level += 1
    if dtype is None:  # nothing is pruned
        return [NOTHING for _ in counts]
    return [searches[k].threshold(dtype) if k > 0 else NOTHING for k in counts]


@dataclass
class _Search:
    """A score that is sought: the `rank`-th lowest (from 1) of the `ties` scores whose keys begin with `prefix`."""

    rank: int
    prefix: int = 0
    ties: int = 0

    def narrow(self, histogram: Tensor, level: int, width: int) -> None:
        """One digit further, of `width` bits, by how many scores there are for each."""
        cumulative = histogram.cumsum(0)
        if self.rank > cumulative[-1]:
            raise UserError(f"cannot prune {self.rank} of {int(cumulative[-1])} weights")
        digit = int(torch.searchsorted(cumulative, self.rank))
        self.ties = int(histogram[digit])
        self.rank -= int(cumulative[digit]) - self.ties
        self.prefix = digit - _HALF if level == 0 else (self.prefix << width) + digit

    def finish(self, keys: Tensor) -> None:
        """All digits at once, from the keys themselves."""
        key = keys.kthvalue(self.rank).values
        self.rank -= int((keys < key).sum())
        self.ties = int((keys == key).sum())
        self.prefix = int(key)

    def threshold(self, dtype: torch.dtype) -> Threshold:
        """Once all digits are known."""
        bits = torch.tensor(self.prefix, dtype=_INTEGER[dtype])
        bits = bits if self.prefix >= 0 else bits ^ torch.iinfo(bits.dtype).max
        return Threshold(bits.view(dtype).item(), self.rank, self.ties)


class Keeper:
    """Turns one tensor of scores after the other, in the order in which the threshold was computed, into what is kept:
    exactly the k weights that it was computed for are pruned.
    """

    def __init__(self, threshold: Threshold):
        self._threshold, self._remaining = threshold, threshold.take

    def __call__(self, score: Tensor) -> Tensor:
        """Return bool (out, in), True where a weight is kept."""
        score, limit = score.contiguous(), self._threshold
        kept = score > limit.value
        if limit.take < limit.ties:  # some of the ties are kept: all but the first `take` of them
            tied = (score == limit.value).reshape(-1).nonzero().squeeze(1)
            kept.view(-1)[tied[self._remaining :]] = True
            self._remaining = max(0, self._remaining - len(tied))
        return kept


def keep(scores: Scores[Name], threshold: Threshold) -> Iterator[tuple[Name, Tensor]]:
    """(name, bool (out, in)), True where a weight is kept, see `Keeper`."""
    keeper = Keeper(threshold)
    return ((name, keeper(score)) for name, score in _named(scores))


def keep_rows(name: str, score: Tensor, count: int | Tensor) -> Tensor:
    """bool (out, in): in each row the `count` lowest scores are False. count: of every row, or of each, (out,)."""
    check_finite(name, score)
    if isinstance(count, Tensor):
        values = lowest_of_rows(score, count)
    elif count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    else:
        values = score.kthvalue(count, dim=1, keepdim=True).values  # (out, 1)
    kept = score > values
    extra = score.shape[1] - count - kept.sum(dim=1)  # ties that stay, (out,)
    rows = extra.nonzero().squeeze(1)
    if len(rows):
        tied = score[rows] == values[rows]
        from_the_right = tied.flip(1).cumsum(1).flip(1)
        kept[rows] |= tied & (from_the_right <= extra[rows, None])
    return kept


def lowest_of_rows(score: Tensor, ranks: Tensor) -> Tensor:
    """(out, 1): in each row the score of this rank, from 1; -inf for rank 0. score: float32 or float64."""
    if score.is_cpu:
        rows = zip(score.numpy(), ranks.tolist(), strict=True)  # numpy: several times as fast as kthvalue
        lowest = [np.partition(row, rank - 1)[rank - 1] if rank else -np.inf for row, rank in rows]
        return torch.tensor(lowest, dtype=score.dtype)[:, None]
    lowest = score.sort(dim=1).values.gather(1, ranks[:, None].clamp(min=1) - 1)
    return lowest.masked_fill_(ranks[:, None] == 0, float("-inf"))


class GroupChoice:
    """The choice that an N:M pattern makes in one group of columns after the other, as `NM.keep` does, but with few
    operations: groups are small, and there are many.

    All pairs of a group are compared at once, and a product with constants counts for each weight how many go before
    it. like: a tensor of the scores' dtype and device.
    """

    def __init__(self, pattern: NM, like: Tensor):
        self._pattern, m = pattern, pattern.m
        if m > _COMPARED:
            return
        pairs = [(first, first + apart) for apart in range(1, m) for first in range(m - apart)]
        votes = torch.zeros(m, len(pairs))
        for number, (first, second) in enumerate(pairs):  # of "the first is above the second"
            votes[first, number], votes[second, number] = 1, -1
        self._votes = votes.to(like)
        self._limits = (m - pattern.n - torch.arange(m)[:, None]).to(like)
        self._compared: list[Tensor] = []  # (M - 1, n), (M - 2, n), ... in `_all`, memory that all groups use

    def __call__(self, scores: Tensor, gone: Tensor) -> None:
        """Fills `gone`, 1 where a weight goes and 0 elsewhere, from scores (M, n); n is always the same."""
        if self._pattern.m > _COMPARED:
            gone.copy_(~self._pattern.keep(scores.t()).t())
            return
        if not self._compared:
            self._all = scores.new_empty(self._votes.shape[1], scores.shape[1])
            self._compared = list(self._all.split(list(range(len(scores) - 1, 0, -1))))
        for apart, compared in enumerate(self._compared, 1):
            torch.gt(scores[:-apart], scores[apart:], out=compared)
        torch.mm(self._votes, self._all, out=gone).lt_(self._limits)


class BlockChoice:
    """Prunes one block of columns after the other: as many of its n lowest scores as `lost` says of n. pattern: blocks
    of weights, whose columns divide its own, are pruned as one, those with the least sum of squared scores.
    """

    def __init__(self, name: str, lost: Lost, pattern: Block | None = None):
        self._name, self._lost, self._pattern = name, lost, pattern

    def __call__(self, scores: Tensor, gone: Tensor) -> None:
        """Fills `gone`, 1 where a weight goes and 0 elsewhere, from scores (columns, out)."""
        if self._pattern:
            blocks = self._pattern.reduce(scores.t().square())
            kept = self._pattern.expand(_keep_lowest(self._name, blocks, self._lost(blocks.numel())))
        else:
            kept = _keep_lowest(self._name, scores.t(), self._lost(scores.numel()))
        gone.copy_(~kept.t())


def keep_within(name: str, score: Tensor, scope: str, lost: Lost, width: int = SELECTION) -> Tensor:
    """Return what is kept, bool (out, in), of a layer in which weights compete within a scope: of each unit (the layer,
    a row, a block of `width` columns) of n weights the lost(n) lowest are pruned.
    """
    if scope == "row":
        return keep_rows(name, score, lost(score.shape[1]))
    return torch.cat([_keep_lowest(name, unit, lost(unit.numel())) for unit in units_of(score, scope, width)], dim=1)


def keep_exactly(name: str, score: Tensor, scope: str, count: int, width: int = SELECTION) -> Tensor:
    """Return what is kept, bool (out, in), of a layer that loses exactly `count` weights, shared out evenly over the
    units of its scope; what is left over goes to the first of them.
    """
    if scope == "row":
        each, more = divmod(count, score.shape[0])
        counts = [each + (row < more) for row in range(score.shape[0])]
        return keep_units(name, score, scope, counts) if more else keep_rows(name, score, each)
    sizes = [unit.numel() for unit in units_of(score, scope, width)]
    return keep_units(name, score, scope, _shared(count, sizes), width)


def keep_units(name: str, score: Tensor, scope: str, counts: Sequence[int], width: int = SELECTION) -> Tensor:
    """Return what is kept, bool (out, in), of a layer whose units of a scope lose so many weights each."""
    if scope == "row":
        wide = score.to(torch.promote_types(score.dtype, torch.float32))
        return keep_rows(name, wide, torch.tensor(counts, device=score.device))
    units = zip(units_of(score, scope, width), counts, strict=True)
    return torch.cat([_keep_lowest(name, unit, count) for unit, count in units], dim=1)


def units_of(score: Tensor, scope: str, width: int = SELECTION) -> Sequence[Tensor]:
    """Return the parts of a layer within which weights compete: its rows, its blocks of columns, or itself."""
    if scope == "row":
        return score.split(1)
    return score.split(width, dim=1) if scope == "block" else (score,)


def _shared(count: int, sizes: Sequence[int]) -> list[int]:
    """A count in proportion to sizes, by largest remainder: of equal remainders the first."""
    total = sum(sizes)
    shares = [divmod(count * size, total) for size in sizes]
    left = count - sum(whole for whole, _ in shares)
    first = sorted(range(len(sizes)), key=lambda i: (-shares[i][1], i))[:left]
    return [whole + (i in first) for i, (whole, _) in enumerate(shares)]


def _keep_lowest(name: str, score: Tensor, count: int) -> Tensor:
    """bool, of the shape of `score`: the `count` lowest of all its scores are False."""
    (threshold,) = thresholds({name: score}, [count])
    ((_, kept),) = keep({name: score}, threshold)
    return kept


def keep_pattern(pattern: NM, name: str, score: Tensor) -> Tensor:
    """Return what a pattern keeps of a layer, bool (out, in): all of it where M does not divide its inputs."""
    check_finite(name, score)
    return pattern.keep(score) if pattern.fits(score.shape[1]) else torch.ones_like(score, dtype=torch.bool)


def lowered(score: Tensor, alive: Tensor) -> Tensor:
    """Return scores in which what was pruned before lies below every survivor, also where survivors score lowest."""
    return torch.where(alive, score, torch.finfo(score.dtype).min)


def pruned_before(score: Tensor) -> Tensor:
    """Return where scores say so, bool of their shape: see `lowered`."""
    return score == torch.finfo(score.dtype).min


def counts_by_name(scores: Scores[str], counts: Sequence[int]) -> list[dict[str, int]]:
    """Return, for each count k, how many of the k lowest of all scores each name has."""
    limits = thresholds(scores, counts)
    found = [{name: kept.numel() - int(kept.count_nonzero()) for name, kept in keep(scores, each)} for each in limits]
    return found


def ascending(values: Tensor) -> Tensor:
    """The order that sorts floating-point values (n,), as indices (n,): of equal values the lowest index first."""
    if not values.is_cpu or values.dtype == torch.float64:
        return values.argsort(stable=True)
    packed = (_ordered("", values.float()).long() << 32) | torch.arange(len(values))
    packed.numpy().sort()  # value, then index: several times as fast as a stable sort
    return packed.bitwise_and_((1 << 32) - 1)


def check_finite(name: str, score: Tensor) -> None:
    if score.numel() and not torch.stack(score.aminmax()).isfinite().all():  # NaN is the least and the greatest
        raise _not_finite(name)


def _not_finite(name: str) -> UserError:
    return UserError(f"the scores of layer {name!r} hold NaN or Inf")


def _named(scores: Scores[Name]) -> Iterable[tuple[Name, Tensor]]:
    return scores.items() if isinstance(scores, Mapping) else scores()


def _histograms(scores: Scores[Any], prefixes: Collection[int], level: int) -> tuple[dict[int, Tensor], torch.dtype]:
    """For each prefix, how many keys that begin with it have each possible next digit; the dtype of the scores."""
    totals: dict[int, Tensor] = {}
    for keys, dtype in _keys(scores):
        for prefix, inside in _inside(keys, prefixes, level):
            first = -_HALF if level == 0 else prefix << _width(dtype, level)
            counts = torch.bincount((inside >> _shift(dtype, level)).sub_(first), minlength=_BUCKETS).cpu()
            totals[prefix] = totals[prefix].add_(counts) if prefix in totals else counts
    return totals, dtype


def _gather(scores: Scores[Any], prefixes: Mapping[int, int], level: int) -> tuple[dict[int, Tensor], torch.dtype]:
    """For each prefix, the keys that begin with it, of which there are as many as given; the dtype of the scores."""
    gathered: dict[int, Tensor] = {}
    filled = dict.fromkeys(prefixes, 0)
    for keys, dtype in _keys(scores):  # noqa: B007 (the last is returned)
        for prefix, inside in _inside(keys, prefixes, level):
            if prefix not in gathered:  # one block each: many small ones would leave holes in memory
                gathered[prefix] = torch.empty(prefixes[prefix], dtype=keys.dtype)
            gathered[prefix][filled[prefix] : filled[prefix] + len(inside)] = inside
            filled[prefix] += len(inside)
    return gathered, dtype


def _inside(keys: Tensor, prefixes: Collection[int], level: int) -> Iterator[tuple[int, Tensor]]:
    """For each prefix of `level` digits, the keys that begin with it."""
    if level == 0:
        yield 0, keys
        return
    heads = keys >> _shift(keys.dtype, level - 1)
    for prefix in prefixes:
        chosen = heads == prefix
        if keys.is_cpu:  # numpy picks few of many several times as fast
            yield prefix, torch.from_numpy(keys.numpy()[chosen.numpy()])
        else:
            yield prefix, keys[chosen]


def _keys(scores: Scores[Any]) -> Iterator[tuple[Tensor, torch.dtype]]:
    """All scores in pieces, as integers that sort like them, and their dtype. Raises UserError for NaN or Inf."""
    first = None
    for name, score in _named(scores):
        score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
        first = first or score.dtype
        if score.dtype != first or first not in _INTEGER:
            raise UserError(f"scores must be floating point and of one dtype, got {score.dtype} for layer {name!r}")
        for piece in score.detach().reshape(-1).split(_PIECE if score.is_cpu else score.numel()):
            yield _ordered(name, piece), first
    if first is None:
        raise UserError("there are no scores to choose from")


def _ordered(name: str, piece: Tensor) -> Tensor:
    """Integers that sort as the floats do; -0.0 and 0.0 are one."""
    integer = _INTEGER[piece.dtype]
    infinity = int(torch.tensor(float("inf"), dtype=piece.dtype).view(integer))
    bits = piece.view(integer)
    lowest, highest = torch.stack(bits.aminmax()).tolist()
    if lowest < 0:  # negative floats sort the other way round: turn all their bits but the sign
        bits = (piece + 0.0).view(integer)
        bits = bits ^ (bits >> (_bits(integer) - 1)).bitwise_and_(torch.iinfo(integer).max)
        lowest, highest = torch.stack(bits.aminmax()).tolist()
    if highest >= infinity or lowest <= ~infinity:
        raise _not_finite(name)
    return bits


def _shift(dtype: torch.dtype, level: int) -> int:
    """How many bits of a key are below the digit at `level`; all of them at level -1."""
    return max(_bits(dtype) - _DIGIT * (level + 1), 0)


def _width(dtype: torch.dtype, level: int) -> int:
    """The bits of the digit at `level`."""
    return _shift(dtype, level - 1) - _shift(dtype, level)


def _bits(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8
