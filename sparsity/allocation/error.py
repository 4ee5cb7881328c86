"""The least sum of the layers' errors: weights are pruned where the next one costs least."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any

from sparsity.allocation.base import LAYER_ERRORS, OUTPUT_SENSITIVITY, Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, fraction
from sparsity.allocation.ratios import Limits, each_alone, limits, rounded, total_of
from sparsity.errors import UserError

_REACH, _STEP, _END = Fraction(3, 10), Fraction(5, 100), Fraction(98, 100)

Point = tuple[Fraction, Fraction]  # sparsity of a layer, error


class Error(Allocation):
    """Least sum of relative errors: each layer's error is measured at sparsities s - 0.3, s - 0.25 ... s + 0.3 within
    (0, 0.98), made convex, linear between them, and the budget is filled by the smallest error per weight pruned. That
    is the optimum for these curves (each is convex, the budget is one linear constraint), up to whole weights.

    Layers stay within the ladder, from 0 on where it would begin there: without pruning there is no error. Only where
    the bounds force some layers out of it, the others follow: below it along the line to no error at no sparsity, above
    it to a relative error of 1 where everything is pruned. Segments of equal error per weight are filled evenly, so
    that equal layers lose the same.

    Args:
        of: "layer", or "output": each curve is multiplied by the layer's sensitivity, the squared change of the model's
            output for each unit of relative error.
    """

    local = True

    def __init__(self, of: str = "layer"):
        if of not in ("layer", "output"):
            raise UserError(f"the allocation error is of the layer or of the output (error:output), got {of!r:.60}")
        self.of = of
        self.statistics = (LAYER_ERRORS, OUTPUT_SENSITIVITY) if of == "output" else (LAYER_ERRORS,)

    def facts(self) -> dict[str, Any]:
        """Return what the provenance of masks says of it."""
        return {"allocation": self.name if self.of == "layer" else f"{self.name}:{self.of}"}

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer. UserError for an error that is not finite, naming the layer, and where the
        plan has no errors.
        """
        bounds = limits(part)
        counts = []
        for sparsity in sparsities:
            total = total_of(part, sparsity, bounds)
            curves = [self._curve(part, name, sparsity) for name in part.names]
            counts.append(rounded(fill(curves, total, bounds), total))
        return each_alone(part, counts)

    def _curve(self, part: Part, name: str, sparsity: Sparsity) -> list[Point]:
        if part.errors is None or (self.of == "output" and part.sensitivity is None):
            raise UserError("--allocation error needs a method whose error at a layer can be measured; choose another")
        scale = part.sensitivity(name, sparsity) if self.of == "output" and part.sensitivity else 1.0
        steps = ladder(sparsity)
        asked = [step for step in steps if step > 0]
        known = [0.0] * (len(steps) - len(asked))
        errors = [scale * error for error in (*known, *part.errors(name, asked))]
        if not all(map(math.isfinite, errors)):
            raise UserError(f"the errors of layer {name!r} hold NaN or Inf")
        points = list(zip(steps, map(Fraction, errors), strict=True))
        return [(Fraction(0), Fraction(0)), *points, (Fraction(1), Fraction(scale))]


def ladder(sparsity: Sparsity) -> list[Fraction]:
    """Return the sparsities at which layers are measured, ascending; 0, which needs no measurement, in place of those
    that are not above it.
    """
    s = fraction(sparsity)
    steps = [s - _REACH + i * _STEP for i in range(int(2 * _REACH / _STEP) + 1)]
    return [Fraction(0)] * (steps[0] <= 0) + [step for step in steps if 0 < step < _END]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """Return the points (ascending) of the largest convex function that is nowhere above them."""
    hull: list[Point] = []
    for point in points:
        # The last corner is none where it is on or above the line from the one before it to this point.
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> Fraction:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class _Segment:
    """Between two corners of a layer's curve. stage: 0 below the ladder, 1 on it, 2 above. price: error per weight."""

    stage: int
    price: Fraction
    layer: int
    weights: Fraction


def fill(curves: Sequence[Sequence[Point]], total: int, bounds: Limits) -> list[Fraction]:
    """Return how many weights each layer loses, `total` together, with the least sum of errors.

    Args:
        curves: for each layer (sparsity, error): at 0, at each step of the ladder and at 1.
    """
    shares = [Fraction(least) for least in bounds.least]
    segments = [s for i, curve in enumerate(curves) for s in _segments(i, curve, bounds)]
    segments.sort(key=lambda segment: (segment.stage, segment.price))
    left = Fraction(total - sum(bounds.least))
    for _, group in groupby(segments, key=lambda segment: (segment.stage, segment.price)):
        equal = list(group)
        room = sum((segment.weights for segment in equal), Fraction(0))
        part = min(Fraction(1), left / room)
        for segment in equal:
            shares[segment.layer] += part * segment.weights
        left -= part * room
    return shares


def _segments(layer: int, curve: Sequence[Point], bounds: Limits) -> list[_Segment]:
    """Return the segments of a layer that lie within its bounds, without those of no length."""
    size = bounds.sizes[layer]
    pieces = (curve[:2], lower_hull(curve[1:-1]), curve[-2:])  # below the ladder, on it, above
    found = []
    for stage, corners in enumerate(pieces):
        for a, b in pairwise(corners):
            weights = min(b[0] * size, bounds.most[layer]) - max(a[0] * size, bounds.least[layer])
            if weights > 0:
                found.append(_Segment(stage, _slope(a, b) / size, layer, Fraction(weights)))
    return found
