"""Weights that learn and weights that stay zero, against the same training written out with autograd."""

from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from engine.options.sparse_training import GradualOptions
from engine.sparse_training.gradual import Gradual
from engine.sparse_training.held import Held, Shadowed
from engine.sparse_training.lora import SCALE, Adapted, Adapters
from models.dino import classification
from models.dino import model as dino
from sparsity.masks import Masks
from sparsity.pattern import NM
from tests.toys import Attention, Conv1D, view_of

STEPS = 12


class Model(nn.Module):
    """Tied weights, a layer stored (in, out), a head that stays dense."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.mixed, self.norm = Attention(), Conv1D(8, 3), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.mixed(self.body(x))))


def view(model=None):
    return view_of(model or Model(), keep_dense=["head", "body.head"])


def random_masks(view, share=0.5):
    generator = torch.Generator().manual_seed(1)
    return Masks({n: torch.rand(w.parameter.shape, generator=generator) > share for n, w in view.weights.items()})


def optimizers(parameters, kind="adamw"):
    parameters = list(parameters)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def loss_of(model, step):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return (model(x) - torch.arange(15.0).view(5, 3).cos()).square().mean()


def train(hold, steps=range(STEPS), seen=None):
    """The order of `engine.training.fit`."""
    for step in steps:
        hold.begin_step(step)
        if seen is not None:
            seen(step)
        loss_of(hold.view.model, step).backward()
        hold.before_step()
        hold.optimizer.step()
        hold.after_step()
        hold.optimizer.zero_grad()


def zeros(view):
    return {name: weight.parameter == 0 for name, weight in view.weights.items()}


def gradual(view, masks=None, target=Decimal("0.75"), steps=STEPS, **options):
    options = {"every": 1, **options}
    return Gradual(GradualOptions(target, **options), view, masks, steps, seed=0)


# Gradual pruning


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("score", ["omp", "localmp"])
@pytest.mark.parametrize("start", [None, 0.5])
def test_each_mask_has_its_sparsity_and_is_nested_and_pruned_weights_stay_zero(kind, score, start):
    own = view()
    masks = None if start is None else random_masks(own, start)
    course = gradual(own, masks, score=score, start=0.1, until=0.8)
    hold = Held(own, optimizers(own.model.parameters(), kind), masks, course)
    before = zeros(own)
    s0, counts = course.before, []

    def seen(step):
        now, at = zeros(own), min(max(step, course.schedule.first), course.schedule.last)
        assert all(bool((now[name] | ~was).all()) for name, was in before.items()), "what was pruned is pruned"
        share = course.schedule.sparsity(at, s0, Fraction(3, 4))
        gone = {name: int(zero.sum()) for name, zero in now.items()}
        if score == "omp" or masks is not None:
            exact = int(share * own.numel)
            assert sum(gone.values()) in ((exact,) if score == "omp" else range(exact - len(gone), exact + 1))
        else:
            assert gone == {name: int(share * weight.numel) for name, weight in own.weights.items()}
        before.update(now)
        counts.append(sum(gone.values()))
        for name, weight in own.weights.items():
            for moment in hold.optimizer.state.get(weight.parameter, {}).values():
                if moment is not None and moment.shape == weight.parameter.shape:
                    assert bool((moment[now[name]] == 0).all()), "their momentum is gone with them"

    train(hold, seen=seen)
    assert counts == sorted(counts) and len(set(counts)) > 5
    assert all(bool((now | ~before[name]).all()) for name, now in zeros(own).items())
    assert [hold.settled(done) for done in range(1, STEPS + 1)] == [done > 10 for done in range(1, STEPS + 1)]


def test_the_smallest_weights_are_pruned():
    """By sorting all magnitudes, at a step on the way."""
    own = view()
    course = gradual(own)
    step = 4
    masks = course.masks(step, lambda name: own.weights[name].matrix().abs(), None)
    sizes = torch.cat([weight.matrix().abs().flatten() for weight in own.weights.values()])
    count = int(course.schedule.sparsity(step, Fraction(0), Fraction(3, 4)) * own.numel)
    limit = sizes.sort().values[count - 1]
    for name, weight in own.weights.items():
        assert torch.equal(masks[name], weight.parameter.abs() > limit)
    assert masks.provenance["pruner"] == "omp" and masks.provenance["sparsity"] == "0.75"


@pytest.mark.parametrize("start", [None, 0.2])
def test_a_pattern_is_reached_group_by_group(start):
    own = view()
    masks = None if start is None else random_masks(own, start)
    hold = Held(own, optimizers(own.model.parameters()), masks, gradual(own, masks, NM(2, 4)))
    kept = []

    def most():
        groups = [~zero.t() if "mixed" in name else ~zero for name, zero in zeros(own).items() if "body" in name]
        return max(int(group.unflatten(-1, (-1, 4)).sum(-1).max()) for group in groups)

    train(hold, seen=lambda step: kept.append(most()))
    assert kept[0] == 4 and kept[-1] == 2 and kept == sorted(kept, reverse=True)


def test_what_is_sparser_already_is_refused():
    own = view()
    masks = random_masks(own, 0.9)
    with pytest.raises(ValueError, match=r"--gradual 75: the mask prunes (89|9\d)"):
        gradual(own, masks)


# Pruned weights that may return


class Through(nn.Module):
    """W * M with a straight-through gradient, as autograd has it."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight + (weight * self.mask - weight).detach()


def test_shadows_learn_with_a_straight_through_gradient():
    """The same weights as a parametrised model, whose gradient autograd takes straight through the mask."""
    own, reference = view(), Model()
    masks = random_masks(own)
    dense = {name: weight.parameter.detach().clone() for name, weight in own.weights.items()}
    hold = Shadowed(own, optimizers(own.model.parameters()), masks, gradual(own, masks, regrow=True), dense=dense)
    named = {name.removesuffix(".weight"): mask for name, mask in masks.items()}
    for name, mask in named.items():
        parametrize.register_parametrization(reference.get_submodule(name), "weight", Through(mask))
    parametrize.register_parametrization(reference.body.again, "weight", Through(named["body.up"]))
    tied = reference.body.again.parametrizations.weight
    tied.original = reference.body.up.parametrizations.weight.original
    optimizer = optimizers(reference.parameters())
    for step in range(6):  # without new masks
        loss_of(reference, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(own.model, step).backward()
        hold.before_step()
        hold.optimizer.step()
        hold.after_step()
        hold.optimizer.zero_grad()
        hold.after_step()  # twice does no harm
    for name in named:
        torch.testing.assert_close(own.model.get_parameter(f"{name}.weight"), reference.get_submodule(name).weight)
        shadow = hold.state_dict()["shadows"][f"{name}.weight"]
        torch.testing.assert_close(shadow, reference.get_submodule(name).parametrizations.weight.original)


def test_pruned_weights_may_return_until_the_last_mask():
    own = view()
    dense = {name: weight.parameter.detach().clone() for name, weight in own.weights.items()}
    course = gradual(own, regrow=True, until=0.7)
    hold = Shadowed(own, optimizers(own.model.parameters()), None, course, dense=dense)
    gone, returned, exact = zeros(own), 0, []

    def seen(step):
        nonlocal returned, gone
        now = zeros(own)
        returned += sum(int((gone[name] & ~now[name]).sum()) for name in now)
        gone = now
        exact.append(sum(int(zero.sum()) for zero in now.values()))

    train(hold, range(9), seen)
    assert returned > 0, "some came back"
    before = zeros(own)
    train(hold, range(9, STEPS), seen)
    assert all(torch.equal(before[name], zero) for name, zero in zeros(own).items()), "the last mask is held"
    assert exact[-1] == int(0.75 * own.numel) and not hold.state_dict()["shadows"]


# Adapters


class LowRank(nn.Module):
    """(W + (a / R) B A) * M, as autograd has it. a and b: parameters to be trained."""

    def __init__(self, a, b, mask, transposed):
        super().__init__()
        self.a, self.b, self.mask, self.transposed = nn.Parameter(a), nn.Parameter(b), mask, transposed

    def forward(self, weight):
        update = SCALE * self.b @ self.a
        return (weight + (update.t() if self.transposed else update)) * self.mask


def adapted(own, masks=None, course=None, kind="adamw"):
    adapters = Adapters(own, 2, ("head.*",), seed=3, device=torch.device("cpu"))
    optimizer = optimizers((parameter for _, parameter in adapters.named_parameters()), kind)
    return adapters, Adapted(own, optimizer, masks, course, adapters=adapters)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_adapters_learn_as_in_a_parametrised_model(kind):
    own, reference = view(), Model()
    masks = random_masks(own)
    adapters, hold = adapted(own, masks, kind=kind)
    trained = []
    for name, mask in masks.items():
        part = LowRank(adapters.a[name].detach().clone(), adapters.b[name].detach().clone(), mask, "mixed" in name)
        layers = [reference.get_submodule(alias.removesuffix(".weight")) for alias in own.weights[name].aliases]
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", part)
        trained += [part.a, part.b]
    optimizer = optimizers([*trained, *reference.head.parameters()], kind)
    before = {name: p.clone() for name, p in own.model.named_parameters()}
    for step in range(6):
        loss_of(reference, step).backward()
        optimizer.step()
        reference.zero_grad()
    train(hold, range(6))
    for name in masks:
        merged = own.model.get_parameter(name)
        torch.testing.assert_close(merged, reference.get_submodule(name.removesuffix(".weight")).weight)
        assert not torch.equal(merged, before[name]) and bool((merged[~masks[name]] == 0).all())
    for name, parameter in own.model.named_parameters():
        if name not in masks:
            assert torch.equal(parameter, before[name]) == (not name.startswith("head.")), "all else is frozen"


def test_adapters_are_pruned_on_the_way():
    own = view()
    _, hold = adapted(own, None, gradual(own))
    gone = zeros(own)
    train(hold)
    assert sum(int(zero.sum()) for zero in zeros(own).values()) == int(0.75 * own.numel)
    assert all(bool((zero | ~gone[name]).all()) for name, zero in zeros(own).items())
    effective = {name: weight.parameter.clone() for name, weight in own.weights.items()}
    hold.verify()
    hold.after_step()
    for name, weight in own.weights.items():
        assert torch.equal(weight.parameter, effective[name]), "merged at every moment"


def test_few_numbers_are_trained_at_the_shapes_of_vit_b():
    with torch.device("meta"):
        model = classification.DINOClassification(dino.Config())
    own = dino.prunable_view(model)
    adapters = Adapters(own, 16, classification.NEW, seed=0, device=torch.device("meta"))
    trained = sum(parameter.numel() for _, parameter in adapters.named_parameters())
    assert trained == adapters.numel == 12 * 16 * (8 * 768 + 2 * (768 + 3072)) + 1000 * 769
    assert trained <= 0.05 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_that_the_loss_scale_skips_moves_nothing(adapters):
    """The gradients overflow in the first step: the optimizer, and what follows its steps, is not called."""
    own = view()
    masks = random_masks(own)
    dense = {name: weight.parameter.detach().clone() for name, weight in own.weights.items()}
    if adapters:
        _, hold = adapted(own, masks, kind="sgd")
    else:
        optimizer = optimizers(own.model.parameters(), "sgd")
        hold = Shadowed(own, optimizer, masks, gradual(own, masks, regrow=True), dense=dense)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    for factor, moves in ((1e36, False), (1.0, True)):
        scaler.scale(factor * loss_of(own.model, 0)).backward()
        hold.before_step()
        scaler.step(hold.optimizer)
        scaler.update()
        hold.after_step()
        hold.optimizer.zero_grad()
        after = own.model.state_dict()
        assert all(bool((after[name][~mask] == 0).all()) for name, mask in masks.items())
        assert any(not torch.equal(after[name], tensor) for name, tensor in before.items()) == moves
