"""The rule that all allocations share: what each layer should lose or keep, made exact within bounds.

Everything is computed in integers and fractions: the counts add up to the budget, and are the same on every machine for
the same criteria.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from sparsity.allocation.base import Contest, Part
from sparsity.allocation.budget import Sparsity, as_written, budget
from sparsity.errors import UserError
from sparsity.selection import counts_by_name


@dataclass(frozen=True)
class Limits:
    """How many weights each layer may lose. All sequences are in prunable order.

    sizes: weights of each layer. least, most: how many of them are pruned at least and at most.
    """

    sizes: Sequence[int]
    least: Sequence[int]
    most: Sequence[int]

    def prune(self, total: int, wanted: Sequence[Fraction]) -> list[int]:
        """Return how many weights each layer loses, `total` together, in proportion to what it is wanted to lose."""
        return rounded(spread(total, self._or_even(wanted), self.least, self.most), total)

    def keep(self, total: int, wanted: Sequence[Fraction]) -> list[int]:
        """Return how many weights each layer loses, `total` together, where each keeps in proportion to what it is
        wanted to keep.
        """
        least = [size - most for size, most in zip(self.sizes, self.most, strict=True)]  # that are kept
        most = [size - least for size, least in zip(self.sizes, self.least, strict=True)]
        kept = spread(sum(self.sizes) - total, self._or_even(wanted), least, most)
        return rounded([size - share for size, share in zip(self.sizes, kept, strict=True)], total)

    def allow(self, counts: Sequence[int]) -> bool:
        """Return whether each layer may lose so many weights."""
        return all(a <= count <= b for a, count, b in zip(self.least, counts, self.most, strict=True))

    def _or_even(self, wanted: Sequence[Fraction]) -> list[Fraction]:
        return list(wanted) if any(wanted) else [Fraction(size) for size in self.sizes]


def limits(part: Part) -> Limits:
    """Return how many weights each layer of a part may lose: what is pruned already stays pruned, and between
    `min_keep` and `max_keep` of each layer is kept, rounded to whole weights inwards.

    Raises:
        UserError: bounds that no number of weights of a layer meets, naming it.
    """
    low, high = check_bounds(part.min_keep, part.max_keep)
    least, most = [], []
    for name, size in zip(part.names, part.sizes, strict=True):
        most.append(math.floor(size * (1 - low)))
        least.append(max(math.ceil(size * (1 - high)), part.pruned.get(name, 0)))
        if least[-1] > most[-1]:
            raise UserError(
                f"layer {name!r} must lose at least {least[-1]} of its {size} weights (pruned already, or --max_keep"
                f" {part.max_keep}) and at most {most[-1]} (--min_keep {part.min_keep}): lower --min_keep"
            )
    return Limits(part.sizes, least, most)


def check_bounds(min_keep: Sparsity, max_keep: Sparsity) -> tuple[Fraction, Fraction]:
    """Return both as numbers. UserError unless they are fractions, the first not above the second."""
    low, high = _kept("min_keep", min_keep), _kept("max_keep", max_keep)
    if low > high:
        raise UserError(f"--min_keep {min_keep} is above --max_keep {max_keep}: lower it, or raise the other")
    return low, high


def _kept(option: str, value: Sparsity) -> Fraction:
    exact = as_written(value)
    if exact is None or not 0 <= exact <= 1:
        raise UserError(f"--{option} must be a fraction from 0 to 1, got {value!r:.60}")
    return exact


def total_of(part: Part, sparsity: Sparsity, bounds: Limits) -> int:
    """Return how many weights a part loses at a sparsity.

    Raises:
        UserError: as many cannot be pruned within the bounds.
    """
    total, least, most = budget(sparsity, part.numel), sum(bounds.least), sum(bounds.most)
    if not least <= total <= most:
        raise UserError(
            f"sparsity {float(Fraction(total, part.numel)):.4g} is {total} of {part.numel} weights, and between {least}"
            f" and {most} can be pruned (--min_keep {part.min_keep}, --max_keep {part.max_keep},"
            f" {sum(part.pruned.get(name, 0) for name in part.names)} pruned already): change one of these"
        )
    return total


def each_alone(part: Part, counts: Sequence[Sequence[int]]) -> list[Contest]:
    """Return a contest for each layer. counts: for each sparsity, how many weights each layer loses."""
    return [Contest([name], [each[i] for each in counts]) for i, name in enumerate(part.names)]


def competing(part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
    """Return the contest of all weights of a part; or one for each layer, clipped, where layers have bounds."""
    bounds = limits(part)
    totals = [total_of(part, sparsity, bounds) for sparsity in sparsities]
    if not part.bounded:
        return [Contest(part.names, totals)]
    return clipped(part, totals, counts_by_name(partial(part.scores, part.names), totals))


def clipped(part: Part, totals: Sequence[int], wanted: Sequence[Mapping[str, int]]) -> list[Contest]:
    """Return a contest for each layer, which loses what is wanted of it as far as its bounds allow: what they free or
    cost is spread over the others in proportion. totals: for each sparsity, how many weights are pruned together.
    """
    bounds, counts = limits(part), []
    for total, each in zip(totals, wanted, strict=True):
        own = [each[name] for name in part.names]
        fine = sum(own) == total and bounds.allow(own)
        counts.append(own if fine else bounds.prune(total, [Fraction(count) for count in own]))
    return each_alone(part, counts)


def exact(part: Part, values: Mapping[str, float]) -> list[Fraction]:
    """Return the criterion of each layer, exactly as the number that it is. UserError for NaN, Inf or a negative one,
    naming the layer.
    """
    for name in part.names:
        if not 0 <= values[name] < math.inf:
            raise UserError(
                f"the allocation's criterion of layer {name!r} is {values[name]}: it must be finite, from 0"
            )
    return [Fraction(values[name]) for name in part.names]


def spread(total: int, wanted: Sequence[Fraction], low: Sequence[int], high: Sequence[int]) -> list[Fraction]:
    """Return shares clamp(t * wanted, low, high) that add up to `total`, for the one factor t that does that.

    So what a clip frees or costs goes to the unclipped ones in proportion to what they want. Those that want nothing,
    or less, get more than their lower bound only after all others are full: in proportion to the room that they have.

    Args:
        total: from sum(low) to sum(high).
    """
    wanting = [i for i, each in enumerate(wanted) if each > 0]
    room = total - sum(low)
    shares = [Fraction(each) for each in low]
    full = sum(high[i] - low[i] for i in wanting)
    if room >= full:
        idle = sum(high) - sum(low) - full
        for i in range(len(shares)):
            part = Fraction(1) if wanted[i] > 0 else Fraction(room - full, idle or 1)
            shares[i] += part * (high[i] - low[i])
        return shares
    # Whole numbers instead of fractions: the sums below are over hundreds of layers.
    scale = math.lcm(*(wanted[i].denominator for i in wanting))
    weights = {i: int(wanted[i] * scale) for i in wanting}

    def filled(factor: Fraction) -> Fraction:
        """How much more than the lower bounds is given at this factor; it never falls as the factor grows."""
        return sum((_clamped(factor, weights[i], low[i], high[i]) - low[i] for i in wanting), Fraction(0))

    # Between two neighbours of these factors no layer meets or leaves a bound: the sum is linear there.
    corners = sorted({Fraction(bound[i], weights[i]) for i in wanting for bound in (low, high)})
    upper = bisect_left(corners, room, key=filled)
    factor = corners[upper]
    if upper > 0:
        below, above = filled(corners[upper - 1]), filled(corners[upper])
        factor = corners[upper - 1] + (factor - corners[upper - 1]) * (room - below) / (above - below)
    for i in wanting:
        shares[i] = _clamped(factor, weights[i], low[i], high[i])
    return shares


def _clamped(factor: Fraction, weight: int, low: int, high: int) -> Fraction:
    return min(max(factor * weight, Fraction(low)), Fraction(high))


def rounded(shares: Sequence[Fraction], total: int) -> list[int]:
    """Return the shares as whole numbers that add up to `total`, by largest remainder: each is rounded down, and those
    that lose most by it get one more, of equal ones the first in prunable order.

    Args:
        total: from the sum of the shares rounded down to that of the shares rounded up.
    """
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])  # stable
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
