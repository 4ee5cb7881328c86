"""AlphaPruning: layers whose spectrum has a heavier tail are kept denser. Reads no data."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity
from sparsity.allocation.ratios import each_alone, limits, total_of
from sparsity.errors import UserError

_RANGE = Fraction(2, 10)  # sparsities are between 1 - 0.2 and 1 + 0.2 times a common factor


class Alpha(Allocation):
    """AlphaPruning, arXiv 2410.10912, with a Hill exponent for each layer: sparsity proportional to 0.8 + 0.4 (a -
    min a) / (max a - min a).

    Layers without an exponent (see `hill_exponent`) get the factor 1; so do all where the exponents are equal. What
    clips free or cost changes the sparsities of the others in proportion to them.

    Cost: the singular values of each layer in float64, O(out * in * min(out, in)) operations, once for all sparsities;
    in memory, one layer in float64 and its decomposition.
    """

    local = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer. UserError for a weight with NaN or Inf, naming the layer."""
        bounds = limits(part)
        factors = _factors([_exponent(part, name) for name in part.names])
        wanted = [factor * size for factor, size in zip(factors, part.sizes, strict=True)]
        return each_alone(part, [bounds.prune(total_of(part, sparsity, bounds), wanted) for sparsity in sparsities])


def _factors(exponents: Sequence[float | None]) -> list[Fraction]:
    known = [Fraction(each) for each in exponents if each is not None]
    lowest, highest = min(known, default=Fraction(0)), max(known, default=Fraction(0))
    if lowest == highest:
        return [Fraction(1) for _ in exponents]
    return [
        Fraction(1) if each is None else 1 - _RANGE + 2 * _RANGE * (Fraction(each) - lowest) / (highest - lowest)
        for each in exponents
    ]


def _exponent(part: Part, name: str) -> float | None:
    weight = part.view.weights[name].matrix()
    if not weight.isfinite().all():
        raise UserError(f"the weight of layer {name!r} holds NaN or Inf")
    return hill_exponent(torch.linalg.svdvals(weight.to(torch.float64)))


def hill_exponent(singular_values: Tensor) -> float | None:
    """Return a = 1 + h / sum of log(ev / x_min) over the h squared singular values ev above their median x_min.

    The median of an even number of values is the mean of the middle two. Where it is 0 and some are above it, the
    logarithms are infinite and a is 1. None where no value is above the median (a single or equal ones).
    """
    ev = singular_values.to(torch.float64).square().sort().values  # (min(out, in),)
    middle = (ev[(len(ev) - 1) // 2] + ev[len(ev) // 2]) / 2
    above = ev[ev > middle]
    logarithms = float((above.log() - middle.log()).sum())
    if not logarithms > 0:  # nothing above, or by less than a rounding
        return None
    return 1.0 if math.isinf(logarithms) else 1 + len(above) / logarithms
