"""The error allocation against the linear programme, solved by trying all its corners."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsity.allocation.error import Error, fill, ladder, lower_hull
from sparsity.allocation.ratios import Limits
from sparsity.errors import UserError
from tests.sparsity.allocation.parts import counts, part_of
from tests.sparsity.allocation.test_ratios import PROFILE
from tests.toys import layers, view_of


def power(exponents):
    """Errors scale * sparsity ** exponent."""
    return lambda name, sparsities: [exponents[name][0] * float(s) ** exponents[name][1] for s in sparsities]


def test_the_ladder_is_within_0_and_098():
    assert ladder("0.5") == [Fraction(i, 20) for i in range(4, 17)]
    assert ladder(0.2) == [0, *(Fraction(i, 20) for i in range(1, 11))]
    assert ladder("0.3")[:2] == [0, Fraction(1, 20)]
    assert ladder("0.9") == [Fraction(i, 20) for i in range(12, 20)]
    assert ladder("0.98")[-1] == Fraction(93, 100)


@PROFILE
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_the_hull_is_the_largest_convex_function_below(values):
    points = [(Fraction(i), Fraction(value)) for i, value in enumerate(values)]
    hull = lower_hull(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(hull, hull[1:], strict=False)]
    assert slopes == sorted(set(slopes))
    assert set(hull) <= set(points) and hull[0] == points[0] and hull[-1] == points[-1]
    for x, y in points:
        assert on(hull, x) <= y


def on(curve, x):
    """The value at x of a function that is linear between the points of a curve."""
    if len(curve) == 1:
        return curve[0][1]
    (x0, y0), (x1, y1) = next((a, b) for a, b in zip(curve, curve[1:], strict=False) if a[0] <= x <= b[0])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def best(hulls, sizes, total):
    """The least sum of errors: at a corner of the programme all layers but one are at a knot."""
    found = []
    for free in range(3):
        others = [i for i in range(3) if i != free]
        for knots in product(*(hulls[i] for i in others)):
            rest = (total - sum(x * sizes[i] for (x, _), i in zip(knots, others, strict=True))) / sizes[free]
            if hulls[free][0][0] <= rest <= hulls[free][-1][0]:
                found.append(sum(y for _, y in knots) + on(hulls[free], rest))
    return min(found)


@PROFILE
@given(st.data())
@pytest.mark.script
def test_it_is_the_optimum_of_the_linear_programme(data):
    sizes = data.draw(st.lists(st.integers(20, 90), min_size=3, max_size=3))
    steps = ladder(data.draw(st.sampled_from(["0.2", "0.5", "0.61", "0.9"])))
    values = [sorted(data.draw(st.lists(st.integers(0, 50), min_size=len(steps), max_size=len(steps)))) for _ in sizes]
    inner = [[(x, Fraction(y)) for x, y in zip(steps, each, strict=True)] for each in values]
    zero, one = (Fraction(0), Fraction(0)), (Fraction(1), Fraction(60))
    low, high = (sum(steps[i] * size for size in sizes) for i in (0, -1))
    total = data.draw(st.integers(-(-low // 1), high // 1))
    free = Limits(sizes, [0] * 3, sizes)
    shares = fill([[zero, *each, one] for each in inner], total, free)
    assert sum(shares) == total
    hulls = [lower_hull(each) for each in inner]
    error = sum(on(hull, share / size) for hull, share, size in zip(hulls, shares, sizes, strict=True))
    assert error == best(hulls, sizes, total)


def test_layers_that_hurt_less_lose_more_within_the_ladder():
    view = view_of(layers((20, 20), (20, 20), (20, 20)))
    errors = power({"a.weight": (1.0, 2), "b.weight": (0.1, 2), "c.weight": (1.0, 2)})
    (found,) = counts(Error(), part_of(view, errors=errors), 0.5)
    assert sum(found.values()) == 600
    assert found["b.weight"] == 320  # up to 0.8
    assert abs(found["a.weight"] - found["c.weight"]) <= 1


def test_equal_layers_lose_the_same_whatever_the_curve():
    view = view_of(layers((20, 20), (20, 20), (20, 20)))
    for exponent in (0.5, 1, 3):  # the first is concave: one segment
        errors = power(dict.fromkeys(view.weights, (1.0, exponent)))
        for sparsity, found in zip(
            (0.1, 0.47, 0.9), counts(Error(), part_of(view, errors=errors), 0.1, 0.47, 0.9), strict=True
        ):
            assert list(found.values()) == [400 * sparsity] * 3


def test_what_bounds_force_out_of_the_ladder_is_met():
    view = view_of(layers((10, 10), (10, 10), (10, 10)))
    errors = power(dict.fromkeys(view.weights, (1.0, 2)))
    part = part_of(view, errors=errors, pruned={"a.weight": 100})
    assert counts(Error(), part, 0.6) == [{"a.weight": 100, "b.weight": 40, "c.weight": 40}]
    part = part_of(view, errors=errors, pruned={"a.weight": 100, "b.weight": 75})
    assert counts(Error(), part, 0.6) == [{"a.weight": 100, "b.weight": 75, "c.weight": 5}]
    assert counts(Error(), part_of(view, errors=errors), "0.99") == [dict.fromkeys(view.weights, 99)]


def test_of_the_output_curves_are_multiplied_by_the_sensitivity():
    view = view_of(layers((20, 20), (20, 20)))
    sensitivity = {"a.weight": 0.1, "b.weight": 2.0}
    scaled = power({"a.weight": (0.1, 2), "b.weight": (2.0, 2)})
    plain = power(dict.fromkeys(view.weights, (1.0, 2)))
    output = Error("output")
    part = part_of(view, errors=plain, sensitivity=lambda name, sparsity: sensitivity[name])
    found = counts(output, part, 0.5)
    assert found == counts(Error(), part_of(view, errors=scaled), 0.5) != [dict.fromkeys(view.weights, 200)]
    with pytest.raises(UserError, match="choose another"):
        output.contests(part_of(view, errors=plain), [0.5])


def test_mistakes_are_one_clear_line():
    view = view_of(layers((4, 4), (4, 4)))
    with pytest.raises(UserError, match="choose another"):
        Error().contests(part_of(view), [0.5])
    with pytest.raises(UserError, match=r"b\.weight"):
        errors = power({"a.weight": (1.0, 2), "b.weight": (float("nan"), 2)})
        Error().contests(part_of(view, errors=errors), [0.5])
    with pytest.raises(UserError, match="got 'input'"):
        Error("input")
