"""When weights are pruned in a run, and how many."""

from fractions import Fraction

import pytest

from engine.sparse_training.schedule import MASKS, Schedule


def test_the_formula():
    """s_t = s + (s0 - s) (1 - (t - t0) / (t1 - t0))^3, in floating point as it is written."""
    schedule, s0, s = Schedule.of(200, 0.1, 0.7, 7), Fraction(1, 4), Fraction(9, 10)
    assert (schedule.first, schedule.last) == (20, 140)
    found = {step: schedule.sparsity(step, s0, s) for step in range(200) if schedule.due(step)}
    assert list(found) == [*range(27, 140, 7), 140]
    for step, sparsity in found.items():
        assert float(sparsity) == pytest.approx(0.9 + (0.25 - 0.9) * (1 - (step - 20) / 120) ** 3, abs=1e-12)
    assert list(found.values()) == sorted(found.values()) and found[140] == s


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 12345])
@pytest.mark.parametrize(("start", "until"), [(0, 0), (0, 0.7), (0.3, 0.3), (0.5, 1), (1, 1)])
def test_the_last_mask_comes_before_the_last_step(steps, start, until):
    schedule = Schedule.of(steps, start, until)
    due = [step for step in range(steps) if schedule.due(step)]
    assert due[-1] == schedule.last < steps and 1 <= len(due) <= MASKS
    assert schedule.sparsity(due[-1], Fraction(0), Fraction(2, 3)) == Fraction(2, 3)


def test_a_run_without_steps():
    with pytest.raises(ValueError, match="no steps"):
        Schedule.of(0, 0, 0.7)
