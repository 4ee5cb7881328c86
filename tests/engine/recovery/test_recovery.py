"""Recovery of a toy: zeros are held, the best is never worse, a killed run goes on to the same bits."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import LoaderBatches, SomeBatches
from engine.options.recovery import RecoveryOptions
from engine.recovery.recovery import Recovery, needed_memory
from engine.training.checkpoint import load_checkpoint
from engine.training.fit import Run
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.view import Output
from tests.toys import Attention, view_of

SETTINGS = {"precision": "32-true", "devices": 1}
OPTIONS = RecoveryOptions(12, lr=0.02, rounds=2, save_every=5)


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 8, generator=generator) for _ in range(20)]


class Toy(nn.Module):
    """Dropout, which recovery leaves out, and a layer that the outputs do not depend on."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.body, self.unused = nn.LayerNorm(8), nn.Dropout(0.5), Attention(), nn.Linear(8, 8)

    def forward(self, x):
        return self.body(self.drop(self.norm(x)))


def outputs(model, batch):
    return {"logits": Output("logits", model(batch))}


@pytest.fixture
def view():
    torch.manual_seed(0)
    return view_of(Toy().eval(), keep_dense=["*.head"], outputs=outputs)


@pytest.fixture
def masks(view):
    """Half of each layer, at random; one layer's kept weights have been updated."""
    generator = torch.Generator().manual_seed(1)
    kept = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in view.weights.items()}
    name = "body.down.weight"
    return Masks(kept, weights={name: 1.5 * view.weights[name].parameter.detach() * kept[name]}, aliases=view.aliases)


def recovery(view, options=OPTIONS, data=None):
    fabric = Fabric(accelerator="cpu", devices=1)
    config = ExternalPruneConfig(calibration="tests.engine.recovery.test_recovery:batches")
    data = data or LoaderBatches(batches, config.calibration, 20, 0)
    return Recovery(options, fabric, view, data, config, seed=0, settings=SETTINGS)


def test_memory_is_that_of_the_dense_model_the_gradients_and_two_moments(view):
    parameters = sum(tensor.numel() for tensor in view.model.parameters())
    assert (needed_memory(view).device, needed_memory(view).host) == (0, 4 * 4 * parameters)


def state(view):
    return {name: tensor.clone() for name, tensor in view.model.state_dict().items()}


def recovered(folder, view, masks, options=OPTIONS):
    with recovery(view, options).recovered(masks, folder) as found:
        return found, state(view)


def same(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_zeros_are_held_and_the_model_is_dense_again(tmp_path, view, masks):
    dense, digest = state(view), masks.digest()
    found, weights = recovered(tmp_path, view, masks)
    same(state(view), dense)
    assert masks.digest() == digest and all(p.requires_grad for p in view.model.parameters())
    for name, mask in masks.items():
        assert not weights[name][~mask].any() and not weights[name].isnan().any()
        used = not name.startswith("unused")
        assert torch.equal(weights[name][mask], dense[name][mask]) != used
    for name in ("norm.weight", "norm.bias", "body.q.bias", "body.head.weight", "body.head.bias"):
        assert name in found.trained and not torch.equal(weights[name], dense[name])
    assert {"body.up.weight", "body.again.weight", "unused.weight"} <= set(found.trained)
    assert torch.equal(weights["body.up.weight"], weights["body.again.weight"])
    assert "unused.bias" not in found.trained and torch.equal(weights["unused.bias"], dense["unused.bias"])
    assert found.after < 0.7 * found.before and found.step > 0


def test_moments_of_pruned_weights_stay_zero(tmp_path, view, masks):
    recovered(tmp_path, view, masks)
    moments = load_checkpoint(tmp_path / "last.pt")["optimizer"]["state"].values()
    shape = masks["body.q.weight"].shape
    square = [m["exp_avg_sq"] for m in moments if m["exp_avg_sq"].shape == shape]
    pruned = [~masks[f"body.{name}.weight"] for name in "qkv"]
    assert len(square) == 3 and all(not m[gone].any() for m, gone in zip(square, pruned, strict=True))
    assert all(m[~gone].any() for m, gone in zip(square, pruned, strict=True))


def test_a_copy_that_was_not_pruned_has_nothing_to_learn(tmp_path, view):
    masks = Masks({name: torch.ones(w.shape, dtype=torch.bool) for name, w in view.weights.items()}, {}, view.aliases)
    dense = state(view)
    found, weights = recovered(tmp_path, view, masks)
    assert found.before == pytest.approx(0, abs=1e-6) and found.step == 0
    same(weights, dense)


def test_the_best_is_never_worse_than_the_start(tmp_path, view, masks):
    found, weights = recovered(tmp_path, view, masks, RecoveryOptions(12, lr=30.0, rounds=2))
    assert found.step == 0 and found.after == found.before
    with masks.applied(view):
        same(weights, state(view))


def test_no_held_out_batch_is_trained_on(tmp_path, view, masks):
    told = recovery(view)
    held = {batch.sum().item() for batch in told.held}
    assert len(held) == 2 and "2 of 20 batches held out (seed 0)" in told.told
    assert not held & {batch.sum().item() for batch, _ in zip(told.rest.stream(), range(40), strict=False)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [3, 13, 23])  # batches, of which a step has two
@pytest.mark.script
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, view, masks, monkeypatch, killed_at):
    whole, expected = recovered(tmp_path / "whole", view, masks)
    stream = SomeBatches.stream

    def cut(self, start=0):
        for number, batch in enumerate(stream(self, start), start):
            if number == killed_at:
                raise Killed
            yield batch

    monkeypatch.setattr(SomeBatches, "stream", cut)
    dense = state(view)
    with pytest.raises(Killed):
        recovered(tmp_path / "cut", view, masks)
    same(state(view), dense)
    monkeypatch.setattr(SomeBatches, "stream", stream)
    found, weights = recovered(tmp_path / "cut", view, masks)
    same(weights, expected)
    assert (found.before, found.after, found.step) == (whole.before, whole.after, whole.step)


def test_a_run_that_was_finished_is_not_trained_again(tmp_path, view, masks, monkeypatch):
    _, expected = recovered(tmp_path, view, masks)
    monkeypatch.setattr(SomeBatches, "stream", None)
    same(recovered(tmp_path, view, masks)[1], expected)


def test_a_checkpoint_of_other_masks_is_refused(tmp_path, view, masks):
    recovered(tmp_path, view, masks)
    other = Masks({name: ~mask for name, mask in masks.items()}, {}, view.aliases)
    with pytest.raises(UserError, match="another configuration"):
        recovered(tmp_path, view, other)


@pytest.mark.script
def test_several_masks_are_recovered_one_after_the_other(tmp_path, view, masks):
    _, expected = recovered(tmp_path / "alone", view, masks)
    other = Masks({name: ~mask for name, mask in masks.items()}, {}, view.aliases)
    several = recovery(view)
    with several.recovered(other, tmp_path / "first"):
        pass
    random = torch.get_rng_state()
    with several.recovered(masks, tmp_path / "second"):
        same(state(view), expected)
    assert torch.equal(torch.get_rng_state(), random), "what is pruned next draws what it would have drawn"
    several.forget()
    assert not list(tmp_path.glob("*/best.pt"))[1:] and (tmp_path / "first" / "log.csv").is_file()


def test_what_is_not_finite_is_refused(tmp_path, view, masks):
    broken = copy.deepcopy(masks.weights)
    broken["body.down.weight"].fill_(torch.inf)
    with pytest.raises(UserError, match="--precision 32-true"):
        recovered(tmp_path, view, Masks(dict(masks), weights=broken, aliases=view.aliases))


def test_a_view_without_outputs_is_refused(tmp_path, masks):
    torch.manual_seed(0)
    view = view_of(Toy().eval(), keep_dense=["*.head"])
    with pytest.raises(UserError, match="no outputs"):
        recovered(tmp_path, view, masks)


def test_steps_are_saved_on_the_way(tmp_path, view, masks, monkeypatch):
    saved, save = [], Run.save
    monkeypatch.setattr(Run, "save", lambda self, step, **options: (saved.append(step), save(self, step, **options)))
    recovered(tmp_path, view, masks)
    assert {5, 10, 12} <= set(saved)
