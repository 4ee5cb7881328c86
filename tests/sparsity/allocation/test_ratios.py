"""The rule that allocations share: exact sums, bounds, proportion."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.allocation.ratios import Limits, exact, limits, rounded, spread, total_of
from sparsity.errors import UserError
from tests.sparsity.allocation.parts import part_of
from tests.toys import layers, view_of

pytestmark = pytest.mark.script

settings.register_profile("allocation", deadline=None, derandomize=True, max_examples=200)
PROFILE = settings.get_profile("allocation")

WANTED = st.one_of(
    st.fractions(0, 5, max_denominator=7), st.floats(0, 1e6).map(Fraction), st.sampled_from([Fraction(0), Fraction(1)])
)


@st.composite
def problems(draw):
    """(total, wanted, low, high) that can be met."""
    n = draw(st.integers(1, 7))
    low = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
    high = [each + draw(st.integers(0, 30)) for each in low]
    wanted = draw(st.lists(WANTED, min_size=n, max_size=n))
    return draw(st.integers(sum(low), sum(high))), wanted, low, high


@PROFILE
@given(problems())
def test_shares_are_exact_within_bounds_and_in_proportion(problem):
    total, wanted, low, high = problem
    shares = spread(*problem)
    assert sum(shares) == total
    assert all(a <= share <= b for a, share, b in zip(low, shares, high, strict=True))
    # Of two that want something: where one has less for what it wants, it is full or the other has its least.
    wanting = [i for i, each in enumerate(wanted) if each > 0]
    for i in wanting:
        for j in wanting:
            if shares[i] / wanted[i] < shares[j] / wanted[j]:
                assert shares[i] == high[i] or shares[j] == low[j]
    # Those that want nothing get something only when all others are full, in proportion to their room.
    idle = [i for i in range(len(low)) if i not in wanting and high[i] > low[i]]
    if any(shares[i] > low[i] for i in idle):
        assert all(shares[i] == high[i] for i in wanting)
    assert len({(shares[i] - low[i]) / (high[i] - low[i]) for i in idle}) <= 1


@PROFILE
@given(problems())
def test_counts_are_exact_within_bounds_and_the_nearest(problem):
    total, _, low, high = problem
    shares = spread(*problem)
    counts = rounded(shares, total)
    assert sum(counts) == total
    assert all(a <= count <= b for a, count, b in zip(low, counts, high, strict=True))
    assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))
    raised = [share % 1 for share, count in zip(shares, counts, strict=True) if count > share]
    lowered = [share % 1 for share, count in zip(shares, counts, strict=True) if count < share]
    assert not raised or not lowered or min(raised) >= max(lowered)


@PROFILE
@given(problems(), st.data())
def test_shares_grow_with_the_total(problem, data):
    total, wanted, low, high = problem
    more = data.draw(st.integers(total, sum(high)))
    for before, after in zip(spread(*problem), spread(more, wanted, low, high), strict=True):
        assert before <= after


@PROFILE
@given(problems(), st.data())
def test_who_wants_more_gets_no_less(problem, data):
    total, wanted, low, high = problem
    i = data.draw(st.integers(0, len(wanted) - 1))
    raised = [each + Fraction(1, 3) * (j == i) for j, each in enumerate(wanted)]
    assert spread(total, raised, low, high)[i] >= spread(*problem)[i]


@PROFILE
@given(problems(), st.data())
def test_a_permutation_of_layers_permutes_the_shares(problem, data):
    total, wanted, low, high = problem
    order = data.draw(st.permutations(range(len(wanted))))
    shares = spread(*problem)
    permuted = spread(total, *([each[i] for i in order] for each in (wanted, low, high)))
    assert permuted == [shares[i] for i in order]
    remainders = [share % 1 for share in shares]
    if len(set(remainders)) == len(remainders):  # no ties, which go by prunable order
        counts = rounded(shares, total)
        assert rounded(permuted, total) == [counts[i] for i in order]


@PROFILE
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.fractions(0, 1), st.floats(1e-9, 1e9))
def test_equal_criteria_are_uniform_whether_pruned_or_kept(sizes, share, criterion):
    total = int(share * sum(sizes))
    free = Limits(sizes, [0] * len(sizes), sizes)
    expected = rounded([Fraction(total * size, sum(sizes)) for size in sizes], total)
    assert free.prune(total, [Fraction(criterion) * size for size in sizes]) == expected
    assert free.keep(total, [Fraction(criterion) * size for size in sizes]) == expected
    assert free.prune(total, [Fraction(0)] * len(sizes)) == free.keep(total, [Fraction(0)] * len(sizes)) == expected


def test_equal_remainders_are_pruned_in_prunable_order():
    assert rounded([Fraction(5, 2)] * 4, 10) == [3, 3, 2, 2]
    assert Limits([5] * 4, [0] * 4, [5] * 4).keep(10, [Fraction(1)] * 4) == [3, 3, 2, 2]


def test_what_a_clip_costs_goes_to_the_others_in_proportion():
    """Wanted 80, 10, 10 of 100, at most 50 each: the 30 that are over go half and half."""
    assert spread(100, [Fraction(8), Fraction(1), Fraction(1)], [0] * 3, [50] * 3) == [50, 25, 25]
    # Wanted 60, 30, 10, at least 20 each: the 10 that are missing come 2 : 1.
    assert spread(100, [Fraction(6), Fraction(3), Fraction(1)], [20] * 3, [100] * 3) == [
        Fraction(160, 3),
        Fraction(80, 3),
        20,
    ]


def test_bounds_are_whole_weights_inwards():
    part = part_of(view_of(layers((3, 5), (2, 5))), min_keep="0.3", max_keep=0.9, pruned={"b.weight": 4})
    assert limits(part) == Limits([15, 10], [2, 4], [10, 7])  # 1.5 and 4.5 of 15; 1, 4 and 3 of 10
    assert limits(part_of(part.view)) == Limits([15, 10], [0, 0], [15, 10])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"min_keep": 0.6, "max_keep": 0.5}, "--min_keep 0.6 is above --max_keep 0.5"),
        ({"min_keep": "x"}, "--min_keep must be a fraction from 0 to 1, got 'x'"),
        ({"max_keep": 60}, "--max_keep must be a fraction from 0 to 1, got 60"),
        ({"min_keep": 0.5, "pruned": {"b.weight": 6}}, "layer 'b.weight' must lose at least 6 of its 10 weights"),
        ({"min_keep": 0.5}, "sparsity 0.6 is 15 of 25 weights, and between 0 and 12 can be pruned"),
        ({"max_keep": 0.3}, "sparsity 0.6 is 15 of 25 weights, and between 18 and 25 can be pruned"),
        ({"pruned": {"a.weight": 15, "b.weight": 1}}, "16 pruned already"),
    ],
)
def test_bounds_that_cannot_be_met_are_one_clear_line(fields, match):
    with pytest.raises(UserError, match=match) as error:
        part = part_of(view_of(layers((3, 5), (2, 5))), **fields)
        total_of(part, 0.6, limits(part))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_criterion_that_is_no_number_names_the_layer(bad):
    part = part_of(view_of(layers((3, 5), (2, 5))))
    with pytest.raises(UserError, match="'b.weight'"):
        exact(part, {"a.weight": 1.0, "b.weight": bad})
