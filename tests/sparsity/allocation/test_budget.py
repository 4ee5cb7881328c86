"""Budgets in decimal arithmetic, sparsities of the command line, and pools."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import pruners
from sparsity.allocation.base import Part
from sparsity.allocation.budget import SCHEDULES, budget, check_schedule, parse_sparsities, step_sparsity
from sparsity.errors import UserError
from sparsity.run.axes import ALLOCATIONS
from tests.toys import layers, view_of


@pytest.mark.parametrize("sparsity", ["0.57", 0.57, Decimal("0.57"), Fraction(57, 100), np.float64(0.57)])
def test_057_of_100_is_57(sparsity):
    assert budget(sparsity, 100) == 57


def test_budgets_are_decimal_floors():
    for percent in range(1, 100):
        for numel in (100, 200, 1000, 184_025_088):
            assert budget(percent / 100, numel) == budget(f"0.{percent:02d}", numel) == percent * numel // 100
    assert budget(0, 10) == 0
    assert budget("0.9999", 10) == 9
    assert budget(Fraction(1, 3), 10) == 3


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, "abc", float("nan"), float("inf"), 63, None, "1/0", ""])
def test_a_sparsity_outside_0_to_1_is_an_error(sparsity):
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        budget(sparsity, 10)


def test_percentages_and_fractions_are_parsed():
    assert parse_sparsities("63,75,90") == [Decimal("0.63"), Decimal("0.75"), Decimal("0.9")]
    assert parse_sparsities(" 0.5, 99.99 ,1") == [Decimal("0.5"), Decimal("0.9999"), Decimal("0.01")]
    assert [budget(s, 100) for s in parse_sparsities("57,0.29")] == [57, 29]


@pytest.mark.parametrize("text", ["0", "100", "-5", "abc", "nan", "inf", "63,,75", "", "63,", "99.991", "63;75"])
def test_a_bad_sparsity_is_one_clear_line(text):
    with pytest.raises(ValueError, match="sparsit") as error:
        parse_sparsities(text)
    assert "\n" not in str(error.value)


def test_the_cubic_schedule_is_exact():
    """s (1 - (1 - t / T)^3): of what is still to be pruned, (2/3)^3 = 8/27 is left after the first of three steps."""
    steps = [step_sparsity("0.54", step, 3, "cubic") for step in (1, 2, 3)]
    assert steps == [Fraction(54, 100) * Fraction(19, 27), Fraction(54, 100) * Fraction(26, 27), "0.54"]
    assert [budget(sparsity, 100) for sparsity in steps] == [38, 52, 54]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_never_fall_and_end_at_the_sparsity(schedule):
    check_schedule(7, schedule)
    counts = [budget(step_sparsity(0.63, step, 7, schedule), 100_000) for step in range(1, 8)]
    assert counts == sorted(counts) and counts[-1] == 63_000 and counts[0] > 0


def test_an_unknown_schedule_is_one_clear_line():
    for call in (lambda: check_schedule(3, "square"), lambda: step_sparsity(0.5, 1, 3, "square")):
        with pytest.raises(ValueError, match="schedule must be one of linear, exp, const, cubic, got 'square'"):
            call()


@pytest.mark.parametrize("name", ["global", "group", "layer", "magnitude"])
def test_contests_cover_all_weights_in_order(name):
    """With the budget of each, which is exact for whatever competes."""
    view = view_of(layers((6, 7), (5, 3), (9, 4)), group_of=lambda name: "y" if name[0] == "b" else "x")
    part = Part(view, list(view.weights), lambda names: pytest.fail("scores were read"))
    contests = ALLOCATIONS.find(name)().contests(part, ["0.4", "0.57"])
    expected = {"global": ["abc"], "group": ["ac", "b"]}.get(name, ["a", "b", "c"])
    assert [contest.names for contest in contests] == [[f"{letter}.weight" for letter in each] for each in expected]
    sizes = {name: weight.numel for name, weight in view.weights.items()}
    for i, sparsity in enumerate(("0.4", "0.57")):
        if name == "magnitude":
            assert sum(contest.counts[i] for contest in contests) == budget(sparsity, 42 + 36) + budget(sparsity, 15)
        else:
            numbers = [sum(sizes[name] for name in contest.names) for contest in contests]
            assert [contest.counts[i] for contest in contests] == [budget(sparsity, numel) for numel in numbers]


def test_a_pool_that_does_not_exist_is_one_clear_line():
    with pytest.raises(UserError, match="pool must be one of global, group, .*, got 'rows'"):
        pruners.build("omp", pool="rows")


def test_arguments_are_parsed_without_torch():
    code = (
        "import sys, pruners, sparsity.allocation.budget, sparsity.pattern\n"
        "pruners.available(); sparsity.allocation.budget.parse_sparsities('63')\n"
        "sparsity.pattern.parse_pattern('2:4')\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("text", ["1e-999999999", "1e999999999", "9" * 6000, "0." + "1" * 100])
def test_numbers_that_take_forever_are_refused_at_once(text):
    for read in (parse_sparsities, lambda text: budget(text, 10)) if len(text) != 102 else (parse_sparsities,):
        with pytest.raises(ValueError, match="got '"):
            read(text)
