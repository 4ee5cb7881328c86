"""Rates, names of masks, checkpointed blocks and the model card."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
from configs.task import OptimizerConfig, SchedulerConfig
from engine.reports.model_card import model_card
from engine.training.finetuning import checkpoint_blocks, rate, read_masks
from engine.training.optimizer import finetuning_optimizer
from sparsity.masks import Masks
from tests.toys import Attention, view_of


def config(lr=0.1, min_lr=0.0, **schedule):
    return SimpleNamespace(optimizer=OptimizerConfig(lr, min_lr=min_lr), scheduler=SchedulerConfig(1, **schedule))


def test_linear_and_cosine_rates():
    linear = [rate(config(sched="linear", num_warmup_steps=0.25), 8, step) for step in range(9)]
    assert linear == pytest.approx([0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    cosine = [rate(config(min_lr=0.01, sched="cosine"), 4, step) for step in range(5)]
    assert cosine == pytest.approx([1, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447, 0.1], rel=1e-5)


def groups(model, new, **options):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = finetuning_optimizer(
        model, OptimizerConfig(0.1, weight_decay=0.5, lr_mult=2, **options), new, "32-true"
    )
    return optimizer, [
        ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def test_new_parameters_learn_faster_and_norms_and_biases_do_not_decay():
    model = nn.ModuleDict({"old": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 2)})
    optimizer, found = groups(model, ["head.*"])
    assert found == [
        ({"old.weight"}, 0.1, 0.5),
        ({"old.bias", "norm.weight", "norm.bias"}, 0.1, 0.0),
        ({"head.weight"}, 0.2, 0.5),
        ({"head.bias"}, 0.2, 0.0),
    ]
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.98)
    optimizer, found = groups(model, [], opt="sgd")
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert [lr for _, lr, _ in found] == [0.1, 0.1]


def test_a_factor_of_the_rate_that_changes_nothing_is_told(caplog):
    model = nn.ModuleDict({"old": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups(model, ["head.*"])
    assert not caplog.messages
    groups(model, [])
    assert caplog.messages == ["lr_mult 2 changes nothing: this model has no newly initialised parameters"]


OWN = [path for path in Path("configs").glob("*/*.yaml") if path.parent.name != "external"]  # heads there are new
FULL_SIZE = [path for path in OWN if "lr_mult" in path.read_text()]


@pytest.mark.parametrize("path", FULL_SIZE, ids=str)
def test_configurations_say_lr_mult_only_where_something_is_new(path):
    assert models.find_task(path.parent.name, path.stem.removesuffix("_mini").removeprefix("image_")).NEW


def test_masks_of_the_file_win_over_inherited_ones(tmp_path):
    """Whichever of them the file has first."""
    view = view_of(nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"}))
    masks = {f"{name}.weight": torch.rand(8, 8) > 0.5 for name in "abc"}
    heirs = {"a.weight": ("b.weight",), "c.weight": ("b.weight",)}
    for order in ("abc", "cba", "bac"):
        Masks({f"{name}.weight": masks[f"{name}.weight"] for name in order}).save(tmp_path / "m.safetensors")
        held = read_masks(tmp_path / "m.safetensors", view, lambda name: [name], lambda name: heirs.get(name, ()))
        assert all(torch.equal(held[name], mask) for name, mask in masks.items())
    Masks({name: mask for name, mask in masks.items() if name != "b.weight"}).save(tmp_path / "m.safetensors")
    held = read_masks(tmp_path / "m.safetensors", view, lambda name: [name], lambda name: heirs.get(name, ()))
    assert torch.equal(held["b.weight"], masks["c.weight"])


def moved(name):
    """The names of a model in which "up" is "first", "q" is held twice and "k" is nowhere."""
    return {"up": ("first",), "q": ("q", "v"), "k": (), "again": ()}.get(name.split(".")[0], (name.split(".")[0],))


def test_masks_find_their_weights_under_other_names(tmp_path):
    view = view_of(Attention(), keep_dense=["head"])
    masks = {name: torch.rand(w.parameter.shape) > 0.5 for name, w in view.weights.items()}
    aliases = {name: w.aliases for name, w in view.weights.items()}
    Masks(masks, {"pruner": "x"}, aliases).save(tmp_path / "m.safetensors")
    model = nn.ModuleDict(
        {"first": nn.Linear(8, 16), "q": nn.Linear(8, 8), "v": nn.Linear(8, 8), "down": nn.Linear(16, 8)}
    )
    names = lambda name: [f"{new}.weight" for new in moved(name) if new != "head"]  # noqa: E731
    held = read_masks(tmp_path / "m.safetensors", view_of(model), names)
    assert set(held) == {"first.weight", "q.weight", "v.weight", "down.weight"} and held.provenance == {"pruner": "x"}
    assert torch.equal(held["first.weight"], masks["up.weight"])
    with pytest.raises(ValueError, match="--mask .*m.safetensors: the masks do not fit this model: 3 missing: first"):
        read_masks(tmp_path / "m.safetensors", view_of(model), lambda name: [name] if name == "down.weight" else [])


def test_a_block_computes_again_what_it_does_not_keep():
    calls = []

    class Block(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x).relu()

    model = nn.Sequential(Block(4, 4), Block(4, 4))
    x = torch.randn(3, 4)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    keys = list(model.state_dict())
    checkpoint_blocks(list(model))
    calls.clear()
    model(x).sum().backward()
    assert len(calls) == 4, "twice each"
    assert all(torch.equal(p.grad, expected) for p, expected in zip(model.parameters(), plain, strict=True))
    assert list(model.state_dict()) == keys


def test_the_card_warns_of_what_has_collapsed_and_says_what_is_not_known():
    view = view_of(Attention(), keep_dense=["head"])
    masks = Masks({name: torch.zeros_like(w.parameter, dtype=torch.bool) for name, w in view.weights.items()})
    card = model_card("title", {"task": "t"}, masks, view, {"test": {"r": 12.34}}, "python x.py")
    assert "- pruner: not recorded in the mask file" in card and "- sparse\n" in card
    assert "Warning: group q has collapsed: 0 of 64 weights are left" in card
    assert "| r      |  12.3 |" in card and "python x.py" in card
