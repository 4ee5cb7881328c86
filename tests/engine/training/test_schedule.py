import math

import pytest

from engine.training.schedule import cooldown, warmup_cosine, warmup_linear


def test_warmup_is_linear_and_reaches_the_peak():
    assert [warmup_cosine(step, 100, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_falls_from_the_peak_to_the_floor():
    rates = [warmup_cosine(step, 100, 10, floor=0.1) for step in range(10, 101)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[45] == pytest.approx(0.55)  # half way
    assert rates[30] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)


def test_without_warmup_and_beyond_the_end():
    assert warmup_cosine(0, 10, 0) == 1.0
    assert warmup_cosine(25, 10, 0, floor=0.2) == pytest.approx(0.2)
    assert warmup_cosine(5, 5, 10) == 0.6  # a run shorter than its warmup


def test_never_above_one_or_negative():
    for total, warmup in ((1, 0), (1, 1), (7, 3), (50, 50)):
        assert all(0 <= warmup_cosine(step, total, warmup) <= 1 for step in range(2 * total))


def test_the_cooldown_is_linear_at_the_end():
    assert [cooldown(step, 10, 4) for step in range(10)] == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert [cooldown(step, 10, 0) for step in (0, 9)] == [1.0, 1.0]
    assert cooldown(0, 3, 6) == 0.5  # a run shorter than its cooldown


def test_the_linear_rate_falls_from_the_peak_to_the_floor():
    rates = [warmup_linear(step, 14, 4, floor=0.5) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == pytest.approx([1.0 - 0.05 * i for i in range(11)] + [0.5])
