"""ECoFLaP's counts, and its importances without gradients."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from sparsity.allocation.ecoflap import Ecoflap, counts_of, zeroth_order
from sparsity.allocation.ratios import Limits
from sparsity.errors import UserError
from sparsity.statistics.gradients import batch_generator
from tests.sparsity.allocation.parts import counts, part_of
from tests.toys import layers, view_of

A, B, C = "a.weight", "b.weight", "c.weight"


def importance(**values):
    return {"zeroth_order": {f"{key}.weight": torch.tensor(value) for key, value in values.items()}}


def test_a_fifth_of_each_is_kept_and_the_rest_by_importance():
    view = view_of(layers((10, 10), (10, 20), (10, 10)))
    # 200 of 400 are kept: 20 + 40 + 20, and 120 more as 3 : 2 : 1 ...
    part = part_of(view, statistics=importance(a=3.0, b=2.0, c=1.0))
    assert counts(Ecoflap(), part, 0.5) == [{A: 20, B: 120, C: 60}]
    # ... or as 9 : 2 : 1, where the first is full with 80 of its 90, and the others share what it frees 2 : 1.
    part = part_of(view, statistics=importance(a=9.0, b=2.0, c=1.0))
    (found,) = counts(Ecoflap(), part, 0.5)
    assert found[A] == 0 and (found[B], found[C]) in ((133, 67), (134, 66))


def test_uniform_where_nothing_is_important_and_where_no_fifth_is_left():
    view = view_of(layers((10, 10), (10, 20), (10, 10)))
    assert counts(Ecoflap(), part_of(view, statistics=importance(a=0.0, b=0.0, c=0.0)), 0.5) == [{A: 50, B: 100, C: 50}]
    part = part_of(view, statistics=importance(a=5.0, b=1.0, c=0.0))
    assert counts(Ecoflap(), part, 0.8, 0.9) == [{A: 80, B: 160, C: 80}, {A: 90, B: 180, C: 90}]


def test_totals_and_bounds_hold_for_any_importance():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 200, (6,), generator=generator).tolist()
        least = [int(size * 0.3 * float(torch.rand((), generator=generator))) for size in sizes]
        most = [size - int(size * 0.1) for size in sizes]
        importances = [Fraction(float(x)) for x in torch.randn(6, generator=generator).mul(5).exp()]
        for total in (sum(least), int(sum(sizes) * 0.6), sum(most)):
            found = counts_of(importances, total, Limits(sizes, least, most))
            assert sum(found) == total
            assert all(a <= count <= b for a, count, b in zip(least, found, most, strict=True))
            if total == int(sum(sizes) * 0.6):
                assert all(count <= 0.8 * size for count, size in zip(found, sizes, strict=True))


def test_an_infinite_importance_names_the_layer():
    part = part_of(view_of(layers((4, 4), (4, 4))), statistics=importance(a=1.0, b=math.inf))
    with pytest.raises(UserError, match=r"b\.weight"):
        Ecoflap().contests(part, [0.5])


class Moving(nn.Module):
    """Its loss moves a buffer and a parameter, reads both, and draws noise: all far larger than what is measured."""

    def __init__(self):
        super().__init__()
        self.net = layers((5, 4), (3, 5), seed=2).double()
        self.register_buffer("queue", torch.zeros(1))
        self.momentum = nn.Parameter(torch.zeros(3, 300).double(), requires_grad=False)  # too large to be restored

    def loss(self, x, generator):
        noise = torch.randn((), generator=generator) + self.queue.item() + self.momentum[0, 0].item()
        self.queue += 100
        self.momentum += 100
        return self.net["b"](self.net["a"](x).tanh()).square().mean() + 100 * noise


@pytest.fixture
def view():
    model = Moving()
    view = view_of(
        model, loss=lambda batch, generator: model.loss(batch, generator), moved_by_loss=["momentum"], forward=None
    )
    return view


def batches(n, seed=0):
    return list(torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_the_model_is_unchanged_to_the_bit_and_results_repeat(view):
    view.model.train()
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    storages = [parameter.data_ptr() for parameter in view.model.parameters()]
    first = zeroth_order(view, batches(3))
    assert all(torch.equal(value, before[name]) for name, value in view.model.state_dict().items())
    assert [parameter.data_ptr() for parameter in view.model.parameters()] == storages
    assert view.model.training and all(parameter.grad is None for parameter in view.model.parameters())
    assert zeroth_order(view, batches(3)) == first
    assert zeroth_order(view, batches(3), seed=1) != first


def test_the_importance_is_that_of_the_gradient(view):
    """|g z| of a normal z has the mean sqrt(2 / pi) |g| and the deviation sqrt(1 - 2 / pi) |g|: five of these, over
    sqrt(400) draws, are the tolerance.
    """
    (batch,) = batches(1)
    found = zeroth_order(view, [batch] * 400)
    view.model.loss(batch, torch.Generator()).backward()
    for name, weight in view.weights.items():
        slope = (found[name] / weight.matrix().square().sum()).sqrt()
        expected = math.sqrt(2 / math.pi) * weight.parameter.grad.norm()
        tolerance = 5 * math.sqrt(1 - 2 / math.pi) * weight.parameter.grad.norm() / math.sqrt(400)
        assert abs(slope - expected) < tolerance


def test_ranks_that_share_the_batches_find_the_same(view):
    every = batches(4)
    other = []
    zeroth_order(
        view,
        every[1::2],
        lambda number: batch_generator(42, 2 * number + 1),
        reduce=lambda sums: other.append(sums.clone()) or sums,
    )
    found = zeroth_order(
        view, every[::2], lambda number: batch_generator(42, 2 * number), reduce=lambda sums: sums + other[0]
    )
    for name, value in zeroth_order(view, every).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0)


def test_the_model_comes_back_after_an_error_and_nan_names_the_layer(view):
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    with pytest.raises(UserError, match=r"net\.a\.weight"):
        zeroth_order(view, [torch.full((6, 4), float("nan"), dtype=torch.float64)])
    with pytest.raises(RuntimeError):
        zeroth_order(view, [torch.zeros(6, 9, dtype=torch.float64)])
    assert all(torch.equal(value, before[name]) for name, value in view.model.state_dict().items())
    with pytest.raises(UserError, match="no calibration batches"):
        zeroth_order(view, [])
