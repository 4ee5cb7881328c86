"""AlphaPruning against its formula, written out with numpy."""

import numpy as np
import pytest
import torch

from sparsity.allocation.alpha import Alpha, hill_exponent
from sparsity.errors import UserError
from tests.sparsity.allocation.parts import counts, part_of
from tests.toys import layers, view_of


def naive(matrix):
    ev = np.sort(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2)
    tail = ev[ev > np.median(ev)]
    return 1 + len(tail) / np.log(tail / np.median(ev)).sum()


def test_counts_are_those_of_the_formula():
    model = layers((40, 30), (20, 50), (33, 33), (10, 60))
    model["b"].weight.data[:, :3] *= 20  # a heavy tail
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    view = view_of(model)
    exponents = {name: naive(weight.matrix()) for name, weight in view.weights.items()}
    low, high = min(exponents.values()), max(exponents.values())
    factors = {name: 0.8 + 0.4 * (each - low) / (high - low) for name, each in exponents.items()}
    mean = sum(factors[name] * weight.numel for name, weight in view.weights.items()) / view.numel
    for sparsity, found in zip((0.3, 0.7), counts(Alpha(), part_of(view), 0.3, 0.7), strict=True):
        assert sum(found.values()) == int(round(sparsity * view.numel, 6))
        for name, weight in view.weights.items():
            assert abs(found[name] - sparsity * factors[name] / mean * weight.numel) < 1 + 1e-6
        ratios = {name: found[name] / weight.numel for name, weight in view.weights.items()}
        assert min(ratios, key=lambda name: ratios[name]) == min(exponents, key=lambda name: exponents[name])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_exponent_of_known_spectra():
    """Squared values 1, e, e^2, e^3 have the median (e + e^2) / 2."""
    values = torch.tensor([3.0, 0.0, 2.0, 1.0]).double().exp().sqrt()
    middle = (np.e + np.e**2) / 2
    assert hill_exponent(values) == pytest.approx(1 + 2 / (5 - 2 * np.log(middle)))
    assert hill_exponent(values[:3]) == pytest.approx(1 + 1 / 1)  # 1, e^2, e^3: one above, by a factor e
    assert hill_exponent(torch.tensor([0.0, 0.0, 0.0, 1.0])) == 1
    for equal in ([1.0], [2.0, 2.0, 2.0], [0.0, 0.0]):
        assert hill_exponent(torch.tensor(equal)) is None


def test_layers_without_an_exponent_are_in_the_middle_and_all_such_are_uniform():
    model = layers((1, 100), (30, 30), (1, 200))
    (found,) = counts(Alpha(), part_of(view_of(model)), 0.5)
    assert abs(found["c.weight"] - 2 * found["a.weight"]) <= 1
    ones = part_of(view_of(layers((1, 100), (1, 300))))
    assert counts(Alpha(), ones, 0.25) == [{"a.weight": 25, "b.weight": 75}]


def test_a_transposed_layer_counts_the_same():
    view = view_of(layers((40, 30), (20, 50)))
    turned = view_of(layers((30, 40), (50, 20)))
    for name, weight in view.weights.items():
        turned.weights[name].parameter.data = weight.parameter.data.t().clone()
    assert counts(Alpha(), part_of(view), 0.6) == counts(Alpha(), part_of(turned), 0.6)


def test_clips_hold():
    part = part_of(view_of(layers((40, 30), (20, 50), (33, 33))), max_keep=0.12, min_keep=0.08)
    (found,) = counts(Alpha(), part, 0.9)
    assert all(0.88 * n <= found[name] <= 0.92 * n for name, n in zip(part.names, part.sizes, strict=True))


def test_nan_names_the_layer():
    model = layers((4, 3), (2, 5))
    model["b"].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"b\.weight"):
        Alpha().contests(part_of(view_of(model)), [0.5])
