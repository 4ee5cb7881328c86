"""Which scores are the k lowest: the one place where a threshold is computed.

Exactly k go, also when scores tie: ties are pruned in prunable order, then row-major in the (out, in) view, lowest
index first.

Radix selection. A float is read as an integer that sorts like it, and a histogram of the top 16 bits tells in which
bucket the k-th lowest score lies; the next pass looks into that bucket only, at the next 16 bits, until none are left
(two passes for float32, four for float64). Scores are seen tensor by tensor, in pieces that stay in the processor's
cache: they are never put side by side, sorted or even held at once, and one histogram serves any number of sparsities.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.allocation import Sparsity, budget, pools
from sparsity.view import PrunableView

Named = Iterable[tuple[str, Tensor]]
Scores = Mapping[str, Tensor] | Callable[[], Named]  # held, or computed again for each pass

_PIECE = 1 << 20  # scores looked at together: they fit a cache, and are worth sharing between threads
_DIGIT = 16
_BUCKETS = 1 << _DIGIT
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Threshold:
    """Scores below `value` go, and the first `take` of the `ties` scores equal to it."""

    value: float
    take: int
    ties: int


NOTHING = Threshold(float("-inf"), 0, 0)


def thresholds(scores: Scores, counts: Sequence[int]) -> list[Threshold]:
    """For each k in `counts`, the threshold below which the k lowest of all scores lie. Floating-point scores of one
    dtype.

    Raises ValueError, naming the layer, for NaN or Inf.
    """
    wanted = sorted(set(counts) - {0})
    if not wanted:
        return [NOTHING for _ in counts]
    prefixes = [0] * len(wanted)  # the bits that are known, as an ordered integer
    ranks = list(wanted)  # the rank of the k-th lowest among the scores with these bits, from 1
    level, levels, ties = 0, 1, [0] * len(wanted)
    while level < levels:
        histograms, dtype = _histograms(scores, prefixes, level)
        levels = torch.finfo(dtype).bits // _DIGIT
        for i, prefix in enumerate(prefixes):
            cumulative = histograms[prefix].cumsum(0)
            if level == 0 and wanted[i] > cumulative[-1]:
                raise ValueError(f"cannot prune {wanted[i]} of {int(cumulative[-1])} weights")
            bucket = int(torch.searchsorted(cumulative, ranks[i]))
            ties[i] = int(histograms[prefix][bucket])
            ranks[i] -= int(cumulative[bucket]) - ties[i]
            prefixes[i] = prefix * _BUCKETS + bucket - (_BUCKETS // 2 if level == 0 else 0)
        level += 1
    found = {
        k: Threshold(_as_float(prefix, dtype), rank, tied)
        for k, prefix, rank, tied in zip(wanted, prefixes, ranks, ties, strict=True)
    }
    return [found.get(k, NOTHING) for k in counts]


def keep(scores: Scores, threshold: Threshold) -> Iterator[tuple[str, Tensor]]:
    """(name, bool (out, in)), True where a weight stays: exactly the k that `threshold` was computed for are False."""
    remaining = threshold.take
    for name, score in _named(scores):
        score = score.contiguous()
        kept = score > threshold.value
        if threshold.take < threshold.ties:  # some of the ties stay: all but the first `take` of them
            tied = (score == threshold.value).reshape(-1).nonzero().squeeze(1)
            kept.view(-1)[tied[remaining:]] = True
            remaining = max(0, remaining - len(tied))
        yield name, kept


def keep_rows(name: str, score: Tensor, count: int) -> Tensor:
    """bool (out, in): in each row the `count` lowest scores are False."""
    check_finite(name, score)
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    values = score.kthvalue(count, dim=1, keepdim=True).values  # (out, 1)
    kept, tied = score > values, score == values
    extra = score.shape[1] - count - kept.sum(dim=1)  # ties that stay, (out,)
    rows = extra.nonzero().squeeze(1)
    if len(rows):
        from_the_right = tied[rows].flip(1).cumsum(1).flip(1)
        kept[rows] |= tied[rows] & (from_the_right <= extra[rows, None])
    return kept


def select(
    view: PrunableView, scores: Callable[[Sequence[str]], Named], pool: str, sparsities: Sequence[Sparsity]
) -> Iterator[dict[str, Tensor]]:
    """For each sparsity the masks, name -> bool (out, in), with exactly the budget of each pool False.

    scores(names) -> (name, score (out, in)) of those weights, in that order; it is called several times.
    """
    if pool == "row":
        for sparsity in sparsities:
            yield {
                name: keep_rows(name, score, budget(sparsity, score.shape[1]))
                for name, score in scores(list(view.weights))
            }
        return
    contests = pools({weight.name: weight.group for weight in view.weights.values()}, pool)
    if pool == "magnitude":
        counts = magnitude_counts(view, sparsities)
        budgets = [[count[name] for count in counts] for (name,) in contests]
    else:
        sizes = [sum(view.weights[name].numel for name in names) for names in contests]
        budgets = [[budget(sparsity, size) for sparsity in sparsities] for size in sizes]
    found = [
        thresholds(_source(scores, names), wanted) for names, wanted in zip(contests, budgets, strict=True)
    ]  # one list per pool, one threshold per sparsity
    for i in range(len(sparsities)):
        yield {
            name: kept
            for names, limits in zip(contests, found, strict=True)
            for name, kept in keep(lambda names=names: scores(names), limits[i])
        }


def _source(scores: Callable[[Sequence[str]], Named], names: Sequence[str]) -> Scores:
    """The scores of a pool: computed once for a single layer, again at each pass for several."""
    return dict(scores(names)) if len(names) == 1 else lambda: scores(names)


def magnitude_counts(view: PrunableView, sparsities: Sequence[Sparsity]) -> list[dict[str, int]]:
    """For each sparsity, how many weights each layer loses when abs(W) is thresholded over its whole group (arXiv
    2404.05621, eq. 7).
    """
    masks = select(
        view, lambda names: ((name, view.weights[name].matrix().abs()) for name in names), "group", sparsities
    )
    return [{name: kept.numel() - int(kept.count_nonzero()) for name, kept in each.items()} for each in masks]


def ascending(values: Tensor) -> Tensor:
    """The order that sorts floating-point values (n,), as indices (n,): of equal values the lowest index first."""
    if not values.is_cpu or values.dtype == torch.float64:
        return values.argsort(stable=True)
    packed = (_ordered(values.float()).long() << 32) | torch.arange(len(values))
    packed.numpy().sort()  # value, then index: several times as fast as a stable sort
    return packed.bitwise_and_((1 << 32) - 1)


def check_finite(name: str, score: Tensor) -> None:
    if not score.isfinite().all():
        raise _not_finite(name)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"the scores of layer {name!r} hold NaN or Inf")


def _named(scores: Scores) -> Named:
    return scores.items() if isinstance(scores, Mapping) else scores()


def _histograms(scores: Scores, prefixes: Sequence[int], level: int) -> tuple[dict[int, Tensor], torch.dtype]:
    """For each distinct prefix, how many of the scores that begin with it have each of the 2^16 next digits; and the
    dtype of the scores.
    """
    totals = {prefix: torch.zeros(_BUCKETS, dtype=torch.int64) for prefix in prefixes}
    dtype = None
    for name, score in _named(scores):
        score = score.float() if score.dtype in (torch.float16, torch.bfloat16) else score
        dtype = dtype or score.dtype
        if score.dtype != dtype or dtype not in _INTEGER:
            raise ValueError(f"scores must be floating point and of one dtype, got {score.dtype} for layer {name!r}")
        digits = {prefix: torch.zeros(_BUCKETS, dtype=torch.int64, device=score.device) for prefix in totals}
        for piece in score.reshape(-1).split(_PIECE):
            keys = _ordered(piece)
            for prefix, histogram in digits.items():
                histogram += _digit_counts(keys, prefix, level)
        if level == 0 and _any_not_finite(digits[0], dtype):
            raise _not_finite(name)
        for prefix, histogram in digits.items():
            totals[prefix] += histogram.cpu()
    if dtype is None:
        raise ValueError("there are no scores to choose from")
    return totals, dtype


def _ordered(piece: Tensor) -> Tensor:
    """Integers that compare as the floats do; -0.0 and 0.0 are one."""
    bits = (piece + 0.0).view(_INTEGER[piece.dtype])
    flips = (bits >> (torch.iinfo(bits.dtype).bits - 1)).bitwise_and_(torch.iinfo(bits.dtype).max)
    return bits.bitwise_xor_(flips)  # negative floats sort the other way round: turn all bits but the sign


def _as_float(key: int, dtype: torch.dtype) -> float:
    """The float whose ordered integer is `key`."""
    bits = torch.tensor(key, dtype=_INTEGER[dtype])
    return (bits if key >= 0 else bits ^ torch.iinfo(bits.dtype).max).view(dtype).item()


def _digit_counts(keys: Tensor, prefix: int, level: int) -> Tensor:
    """Histogram (2^16,) of the digit at `level` of those keys whose higher digits are `prefix`."""
    shift = torch.iinfo(keys.dtype).bits - _DIGIT * (level + 1)
    if level == 0:
        return torch.bincount((keys >> shift).add_(_BUCKETS // 2), minlength=_BUCKETS)
    inside = keys[(keys >> (shift + _DIGIT)) == prefix]
    return torch.bincount((inside >> shift).bitwise_and_(_BUCKETS - 1), minlength=_BUCKETS)


def _any_not_finite(top_digits: Tensor, dtype: torch.dtype) -> bool:
    """Whether Inf or NaN was counted: their keys are the highest and, negative, the lowest of all."""
    infinity = torch.tensor(float("inf"), dtype=dtype).view(_INTEGER[dtype]).item()
    half, first = _BUCKETS // 2, infinity >> (torch.iinfo(_INTEGER[dtype]).bits - _DIGIT)
    return bool(top_digits[half + first :].any() | top_digits[: half - first].any())
