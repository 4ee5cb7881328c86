"""Memory that a plan needs, from shapes, against the measured peak and sums that are written out."""

import pytest

from benchmarks.memory import measured, stack
from sparsity.errors import UserError
from sparsity.run.memory import Demand, Memory, check_memory, preflight_bytes
from sparsity.statistics.hessian import strips
from tests.toys import layers, view_of

SMALL, LARGE = 3, 9  # blocks
PLANS = [
    ("snip", Demand(["mean_gradient"], 2)),
    ("omp", Demand((), 2)),
    ("wanda+calibration_mode=sequential", Demand(["input_norms"], 2, sequential=True)),
    ("sparsegpt+enable_update", Demand(["hessian"], 2, solver=True, sequential=True)),
]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("plan", "demand"), PLANS)
def test_predicted_slope_bounds_the_measured_one(plan, demand, tmp_path):
    # The highest of three: readings on a machine that others share can miss a peak, but find none that is not there.
    (few, least), (many, most) = (max(measured(plan, blocks, tmp_path) for _ in range(3)) for blocks in (SMALL, LARGE))
    slope = (most - least) / (many - few)
    low, high = (preflight_bytes(demand, stack(blocks)).host for blocks in (SMALL, LARGE))
    predicted = (high - low) / (many - few)
    assert slope <= predicted <= 2 * slope


def sizes(demand, view):
    return preflight_bytes(demand, view).host


def test_each_part_is_what_the_table_says():
    view = view_of(layers((16, 8), (8, 16), (4, 8)))
    plain, n = sizes(Demand(), view), view.numel
    assert sizes(Demand(sparsities=3), view) - plain == int(2 * (n / 8 + 2**26))
    assert sizes(Demand(rows=12345), view) - plain == 12345
    assert sizes(Demand(["input_norms"]), view) - plain == 8 * (8 + 16 + 8)
    assert sizes(Demand(["mean_gradient"]), view) - plain == 4 * n + 4 * 128
    assert sizes(Demand(["learned_scores"]), view) - plain == 18 * n + 8 * 128
    assert sizes(Demand(["gradient_rows"]), view) - plain == 8 * n + 12 * 128
    assert sizes(Demand(solver=True), view) - plain == 3 * 4 * n  # without blocks, all weights are one
    entries = sum([where.stop for _, where in strips(width)][-1] for width in (8, 16, 8))
    factor = max(12 * width**2 + 28 * numel for width, numel in ((8, 128), (16, 128), (8, 32)))
    assert sizes(Demand(["hessian"]), view) - plain == 8 * entries + factor


def test_sequential_plans_hold_one_block():
    model = layers((64, 64), (64, 64), (64, 64))
    one = view_of(model, blocks=list(model.values()))
    demand = Demand(["hessian"], solver=True, sequential=True)
    double = layers((64, 64), (64, 64), (64, 64), (64, 64), (64, 64), (64, 64))
    more = view_of(double, blocks=list(double.values()))
    assert sizes(demand, more) - sizes(demand, one) == (more.numel - one.numel) // 4  # masks alone


def test_what_does_not_fit_is_refused_in_one_line_that_says_what_would():
    demand = Demand(["hessian"], sparsities=3)
    check_memory(Memory(10, 10), Memory(10, 10), demand)
    with pytest.raises(UserError) as error:
        check_memory(Memory(2 * 10**9, 10), Memory(10**9, 10), demand)
    message = str(error.value)
    assert "\n" not in message and "2 GB on the device, where 1 GB are free, besides" in message
    for remedy in ("--offload", "sequential", "fewer --sparsities"):
        assert remedy in message
    with pytest.raises(UserError) as error:
        check_memory(Memory(0, 20), Memory(0, 10), Demand(rows=15))
    assert "20 B on the host" in str(error.value) and "--memory_budget" in str(error.value)
    assert "--offload" not in str(error.value)
