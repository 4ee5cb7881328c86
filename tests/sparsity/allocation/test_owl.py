"""OWL against its formula, written out."""

import pytest
import torch
from torch import nn

from sparsity.allocation.owl import Owl
from sparsity.errors import UserError
from tests.sparsity.allocation.parts import counts, part_of
from tests.toys import layers, view_of

NORMS = torch.Generator().manual_seed(1)


def outlying(*shapes, share, seed):
    """Layers of which a share of the weights is ten times as large."""
    block = layers(*shapes, seed=seed)
    for layer in block.values():
        large = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < share
        layer.weight.data[large] *= 10
    return block


@pytest.fixture
def view():
    model = nn.ModuleDict(
        {
            "first": outlying((30, 20), (10, 40), share=0.02, seed=1),
            "second": outlying((25, 25), share=0.08, seed=2),
            "third": outlying((20, 30), (12, 12), share=0.0, seed=3),
            "head": nn.Linear(40, 15),
        }
    )
    return view_of(model, blocks=[model["first"], model["second"], model["third"]])


def norms(view):
    return {
        name: torch.rand(weight.shape[1], generator=NORMS, dtype=torch.float64) for name, weight in view.weights.items()
    }


@pytest.mark.parametrize("sparsity", ["0.5", 0.7])
def test_counts_are_those_of_the_formula(view, sparsity):
    statistics = norms(view)
    (found,) = counts(Owl(), part_of(view, statistics={"input_norms": statistics}), sparsity)
    share, sizes = {}, {name: weight.numel for name, weight in view.weights.items()}
    for block in ("first", "second", "third", "head"):
        names = [name for name in view.weights if name.startswith(block)]
        scores = [(view.weights[name].matrix().abs().double() * statistics[name].sqrt()).flatten() for name in names]
        scores = torch.cat(scores)
        share |= dict.fromkeys(names, float((scores > 5 * scores.mean()).double().mean()))
    low, high = min(share.values()), max(share.values())
    assert low < high
    term = {name: 2 * 0.08 * (each - low) / (high - low) for name, each in share.items()}
    mean = sum(term[name] * sizes[name] for name in sizes) / view.numel
    for name, size in sizes.items():
        assert abs(found[name] - size * (float(sparsity) - term[name] + mean)) < 1
    assert sum(found.values()) == int(float(sparsity) * view.numel)


def test_equal_outliers_are_uniform(view):
    for weight in view.weights.values():
        weight.parameter.data.fill_(1.0)
    ones = {name: torch.ones(weight.shape[1]) for name, weight in view.weights.items()}
    part = part_of(view, statistics={"input_norms": ones})
    (found,) = counts(Owl(), part, 0.6)
    assert all(abs(found[name] - 0.6 * weight.numel) < 1 for name, weight in view.weights.items())


def test_at_high_sparsities_no_layer_loses_more_than_it_has(view):
    part = part_of(view, statistics={"input_norms": norms(view)})
    for found in counts(Owl(), part, 0.01, 0.97):
        assert all(0 <= found[name] <= weight.numel for name, weight in view.weights.items())
    (found,) = counts(Owl(), part_of(view, statistics=part.statistics, min_keep="0.02"), 0.97)
    assert all(found[name] <= 0.98 * weight.numel for name, weight in view.weights.items())
    assert sum(found.values()) == int(0.97 * view.numel)


def test_without_blocks_each_layer_is_one():
    view = view_of(outlying((30, 20), (20, 30), share=0.05, seed=4))
    view.weights["b.weight"].parameter.data.fill_(1.0)
    (found,) = counts(Owl(), part_of(view, statistics={"input_norms": norms(view)}), 0.5)
    assert found == {"a.weight": 252, "b.weight": 348}  # 0.08 * 600 = 48 of each away from 300


def test_nan_names_the_layer(view):
    statistics = norms(view)
    statistics["second.a.weight"][3] = float("nan")
    with pytest.raises(UserError, match=r"second\.a\.weight"):
        Owl().contests(part_of(view, statistics={"input_norms": statistics}), [0.5])
