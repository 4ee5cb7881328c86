"""Learnable masks in models that were not made for them: each computes with what its gates say, however it reads its
weights.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.external import model as external
from sparsity.learned.gates import candidates, gumbel
from sparsity.learned.layer import folded
from sparsity.learned.learnable_masks import LearnableMasks
from sparsity.pattern import NM
from tests.tiny_models import TIMM, TRANSFORMERS, batch_for, make_timm, side

PATTERN, CLOSE = NM(2, 4), {"rtol": 1e-4, "atol": 0.0}
UNUSED = {"llava": ["*vision_tower.encoder.layers.1.*"]}  # it reads the features before the last layer


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Reads(nn.Module):
    """A layer with a forward of its own, and one whose weight is read past it, twice."""

    def __init__(self):
        super().__init__()
        self.own, self.read = Own(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return (F.linear(self.own(x), self.read.weight) @ self.read.weight.t()).square().mean()


def loss_of(kind):
    """A view, and a function without arguments that runs its model."""
    torch.manual_seed(0)
    if kind == "reads":
        model, x = Reads(), torch.randn(3, 8)
        return external.prunable_view(model), lambda: model(x)
    if kind in TIMM:
        model, images = make_timm(kind).eval(), torch.randn(2, 3, side(kind), side(kind))
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):  # tiny at first, as if the layers were not there
                nn.init.ones_(parameter)
        return external.prunable_view(model), lambda: model(images).square().mean()
    model, batch = TRANSFORMERS[kind]().eval(), batch_for(kind)
    view = external.prunable_view(model, exclude=UNUSED.get(kind, ()))
    return view, lambda: view.loss(batch)


def sampled(masks, name):
    """The candidates (out, in) that the noise of a step prefers, from the formula."""
    gate, layer = masks.gates[name].detach(), next(layer for own, layer in masks.layers() if own == name)
    noise = gumbel(tuple(gate.t().shape), layer.key).t()
    best = ((layer.scaling * gate + noise) / layer.tau).argmax(dim=1)
    return candidates(PATTERN)[best].view(layer.matrix.shape)


def with_masks(view, kept, run):
    """Return what the model gives where its weights are multiplied with masks (out, in)."""
    before = {name: view.weights[name].parameter.data for name in kept}
    try:
        for name, mask in kept.items():
            weight = view.weights[name]
            weight.parameter.data = before[name] * weight.as_stored(mask)
        with torch.no_grad():
            return run()
    finally:
        for name, data in before.items():
            view.weights[name].parameter.data = data


@pytest.mark.parametrize("kind", ["reads", *TIMM, *TRANSFORMERS])
def test_samples_in_training_and_choices_in_evaluation(kind):
    view, run = loss_of(kind)
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    kinds = [type(module) for module in view.model.modules()]
    masks = LearnableMasks(view, PATTERN, hard=True, seed=1)
    masks.anneal(scaling=2.0, tau=0.5)
    masks.freeze_weights()
    masks.draw(3)
    for _, layer in masks.layers():
        layer.train()
    with pytest.raises(ValueError, match="cannot be learned"):
        masks.check_gradients()
    loss = run()
    loss.backward()
    masks.check_gradients()
    for _, layer in masks.layers():
        layer.eval()
    chosen = run()
    with folded(view.model):
        assert torch.equal(run(), chosen)
    drawn = {name: sampled(masks, name) for name in masks.gates}
    learned = {name: mask for name, mask in masks.masks().items() if name in masks.gates}
    learned = {name: mask.t() if view.weights[name].transposed else mask for name, mask in learned.items()}
    masks.detach()
    assert [type(module) for module in view.model.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in view.model.state_dict().items())
    torch.testing.assert_close(loss.detach(), with_masks(view, drawn, run), **CLOSE)
    torch.testing.assert_close(chosen.detach(), with_masks(view, learned, run), **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss, run(), **CLOSE)


def test_gradients_of_a_weight_that_is_read_are_those_of_its_layer():
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    found = []
    for read in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleDict({"a": nn.Linear(8, 8)}).train()
        masks = LearnableMasks(external.prunable_view(model), PATTERN, seed=1)
        masks.draw(0)
        layer = model["a"]
        y = F.linear(x, layer.weight, layer.bias) if read else layer(x)
        (y.square().mean() - 0.1 * masks.squared_weight()).backward()
        found.append([layer.gate.grad, layer.parameter.grad, layer.bias.grad])
    torch.testing.assert_close(*found)
