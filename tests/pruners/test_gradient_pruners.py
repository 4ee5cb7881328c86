"""SNIP, iterative SNIP and Taylor: known answer, naive formulas, schedules, nothing left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import pruners
from models.xvlm import model as xvlm
from sparsity.allocation.budget import budget, step_sparsity
from sparsity.errors import UserError
from sparsity.run.request import Request
from sparsity.selection import keep, thresholds
from sparsity.statistics.gradients import batch_generator, mean_gradients
from sparsity.statistics.passes import collect
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView
from tests.conftest import SMALL


@pytest.fixture
def in_lockstep(small_batches):
    return [b for pair in zip(small_batches["general"], small_batches["region"], strict=True) for b in pair]


def test_snip_mask_with_the_recorded_negatives(small_xvlm, in_lockstep):
    """One stream seeded with 42 for the whole pass draws the negatives that the published run drew."""
    view = xvlm.prunable_view(small_xvlm)
    stream = torch.Generator().manual_seed(42)
    snip = pruners.build("snip")
    measured = snip.measure(view, CalibrationPass(in_lockstep, generators=lambda number: stream))
    ((_, masks),) = snip.masks(view, measured, Request(["0.63"]))
    expected = load_file(SMALL / "masks_63" / "snip.safetensors")
    differing = sum(int((masks[name] != expected[name].bool()).sum()) for name in expected)
    assert differing <= 0.001 * masks.total
    recorded = json.loads((SMALL / "masks_63" / "snip.json").read_text())
    assert abs(masks.kept - recorded["kept"]) <= 0.001 * masks.total
    assert sum(float(score.sum()) for _, score in snip.scores(view, measured)) == pytest.approx(1.0, rel=1e-4)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4), nn.LayerNorm(4)).double()

    def loss(batch, generator=None):
        return model(batch).square().sum()

    view = PrunableView(model, group_of=lambda name: "all", loss=loss)
    return view, [torch.randn(3, 6, dtype=torch.float64) for _ in range(4)]


def test_mean_gradient_is_autograds_and_leaves_nothing_behind(toy):
    view, batches = toy
    view.model.train()
    view.model[4].weight.requires_grad_(False)
    view.model[0].weight.grad = torch.ones(5, 6, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in view.model.state_dict().items()}
    gradients = mean_gradients(view, batches)
    assert view.model.training and view.model[2].training
    assert torch.equal(view.model[0].weight.grad, torch.ones(5, 6)) and view.model[3].weight.grad is None
    assert [p.requires_grad for p in view.model.parameters()] == [True, True, True, True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in view.model.state_dict().items())
    view.model.eval()
    for name, weight in view.weights.items():
        naive = torch.stack([torch.autograd.grad(view.loss(b), weight.parameter)[0] for b in batches]).mean(0)
        torch.testing.assert_close(gradients[name], naive)


def test_an_exception_leaves_nothing_behind(toy):
    view, batches = toy
    view.model.train()
    with pytest.raises(RuntimeError):
        mean_gradients(view, [batches[0], torch.randn(3, 7, dtype=torch.float64)])
    assert view.model.training and all(p.requires_grad and p.grad is None for p in view.model.parameters())


def test_gradients_of_two_ranks_are_those_of_one(toy):
    view, batches = toy
    whole = mean_gradients(view, batches)
    shares = [mean_gradients(view, batches[rank::2]) for rank in range(2)]
    for name in whole:
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, whole[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_naming_the_layer(toy, bad):
    view, batches = toy
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        mean_gradients(view, [batches[0] * bad])
    with pytest.raises(ValueError, match="no calibration batches"):
        mean_gradients(view, [])


def test_a_layer_without_gradient_is_named(toy):
    view, batches = toy
    view._loss = lambda batch, generator: view.model[0](batch).sum()
    with pytest.raises(ValueError, match=r"'3\.weight' got no gradient"):
        mean_gradients(view, batches)


def test_negatives_are_a_function_of_seed_and_batch_number(small_xvlm, in_lockstep):
    view = xvlm.prunable_view(small_xvlm)
    first = mean_gradients(view, in_lockstep[2:3], generators=lambda number: batch_generator(42, 2))
    torch.manual_seed(123)
    again = mean_gradients(view, in_lockstep[2:3], generators=lambda number: batch_generator(42, 2))
    other = mean_gradients(view, in_lockstep[2:3], generators=lambda number: batch_generator(42, 3))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("schedule", ["linear", "exp", "const"])
def test_schedules_end_exactly_at_the_sparsity(schedule):
    steps = [float(step_sparsity("0.63", t, 5, schedule)) for t in range(1, 6)]
    formula = {"linear": lambda t: 0.63 * t / 5, "exp": lambda t: 1 - 0.37 ** (t / 5), "const": lambda t: 0.63}
    assert steps == pytest.approx([formula[schedule](t) for t in range(1, 6)])
    assert step_sparsity("0.63", 5, 5, schedule) == "0.63"


@pytest.mark.parametrize("schedule", ["linear", "exp", "const"])
def test_itersnip_equals_a_naive_loop(toy, schedule):
    view, batches = toy
    epochs, sparsity = 3, "0.6"
    fresh = [[batch + t for batch in batches] for t in range(epochs)]

    naive = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in view.weights.items()}
    dense = {name: weight.matrix().clone() for name, weight in view.weights.items()}
    for t in range(epochs):
        for name, weight in view.weights.items():
            weight.matrix().copy_(dense[name] * naive[name])
        gradients = mean_gradients(view, fresh[t])
        scores = {n: torch.where(naive[n], (gradients[n] * dense[n]).abs(), -1.0) for n in naive}
        count = budget(step_sparsity(sparsity, t + 1, epochs, schedule), view.numel)
        naive = dict(keep(scores, thresholds(scores, [count])[0]))
    for name, weight in view.weights.items():
        weight.matrix().copy_(dense[name])

    pruner = pruners.build("itersnip", epochs=epochs, schedule=schedule)
    calibrations = [CalibrationPass(batches) for batches in fresh]
    measured = pruner.measure(view, calibrations[0])
    ((_, masks),) = pruner.masks(view, measured, Request([sparsity]), calibrations.__getitem__)
    assert all(torch.equal(masks[name], naive[name]) for name in naive)
    assert masks.total - masks.kept == budget(sparsity, view.numel)
    assert all(torch.equal(weight.matrix(), dense[name]) for name, weight in view.weights.items())


def test_itersnip_of_one_epoch_is_snip(toy):
    view, batches = toy
    for name in ("0.3", "0.9"):
        ((_, snip),) = pruners.build("snip").prune(view, batches, [name])
        ((_, itersnip),) = pruners.build("itersnip").prune(view, batches, [name])
        assert snip.digest() == itersnip.digest()


# Taylor


def test_taylor_is_the_mean_of_squares_of_each_batch(toy):
    view, batches = toy
    pruner = pruners.build("taylor")
    scores = dict(pruner.scores(view, pruner.measure(view, CalibrationPass(batches))))
    expected = {}
    view.model.eval()
    for name, weight in view.weights.items():
        gradients = [torch.autograd.grad(view.loss(batch), weight.parameter)[0] for batch in batches]
        expected[name] = sum((weight.matrix() * gradient) ** 2 for gradient in gradients) / len(batches)
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-10, atol=0)
    for sparsity, masks in pruner.prune(view, batches, ["0.3", "0.6"]):
        kept = dict(keep(expected, thresholds(expected, [budget(sparsity, view.numel)])[0]))
        assert all(torch.equal(masks[name], kept[name]) for name in kept)


def test_taylor_by_hand():
    """w = (2, 3), loss w x: gradients x, of which the mean is 0 in the first weight, and the mean square is not."""
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    view = PrunableView(model, group_of=lambda name: "all", loss=lambda batch, generator: model(batch).sum())
    batches = [torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[-1.0, 0.5], [0.0, 0.5]]).double()]
    pruner = pruners.build("taylor")
    ((_, score),) = pruner.scores(view, pruner.measure(view, CalibrationPass(batches)))
    assert score.tolist() == [[4.0, 9.0]]
    (mean,) = mean_gradients(view, batches).values()
    assert mean.tolist() == [[0.0, 1.0]]


def test_squares_of_a_tied_weight_are_those_of_the_gradient_of_all_its_uses():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}).double()
    model["b"].weight = model["a"].weight

    def loss(batch, generator=None):
        return model["b"](model["a"](batch).tanh()).square().sum()

    view, batches = PrunableView(model, group_of=lambda name: "all", loss=loss), torch.randn(3, 2, 4).double()
    found = collect(view, "squared_gradient", list(batches))
    (weight,) = view.weights.values()
    gradients = [torch.autograd.grad(loss(batch), weight.parameter)[0] for batch in batches]
    torch.testing.assert_close(found[weight.name], torch.stack(gradients).square().mean(0), rtol=1e-10, atol=0)


def test_squares_add_up_across_a_backward_within_a_backward(toy):
    """Reentrant checkpointing gives the gradient of a weight that is used inside and outside of it in two parts."""
    view, batches = toy
    view.model.eval()
    first = view.model[0]

    def inside(x):
        return first(x).tanh()

    def loss(batch, generator=None):
        batch = batch.clone().requires_grad_()
        again = checkpoint(inside, batch, use_reentrant=True)
        return (again.square() + first(batch)).sum() + view.model[3](again).sum()

    view._loss = loss
    found = collect(view, "squared_gradient", batches)["0.weight"]

    def plain(batch):
        return (inside(batch).square() + first(batch)).sum() + view.model[3](inside(batch)).sum()

    gradients = [torch.autograd.grad(plain(batch), first.weight)[0] for batch in batches]
    torch.testing.assert_close(found, torch.stack(gradients).square().mean(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_squares_of_half_precision_add_up_in_float32(toy, dtype):
    view, _ = toy
    view.model.to(dtype)
    batches = list(torch.randn(200, 2, 6, generator=torch.Generator().manual_seed(1)).to(dtype))
    found = collect(view, "squared_gradient", batches)
    each = [mean_gradients(view, [batch]) for batch in batches]
    for name, squares in found.items():
        assert squares.dtype == torch.float32
        expected = sum(one[name].double().square() for one in each) / len(each)
        torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=0)


def test_one_statistic_of_gradients_at_a_time(toy):
    view, batches = toy
    with pytest.raises(UserError, match="mean_gradient and squared_gradient come from a pass each"):
        collect(view, ["squared_gradient", "mean_gradient"], batches)
    with pytest.raises(UserError, match=r"'3\.weight' got no gradient"):
        view._loss = lambda batch, generator: view.model[0](batch).sum()
        collect(view, "squared_gradient", batches)
