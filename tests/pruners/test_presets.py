"""Presets: what they stand for, that options beat them, and that masks say it."""

from fractions import Fraction

import pytest
import torch
from torch import nn

import pruners
from pruners.presets import PRESETS, Choice, Preset
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.run.request import Request

TARGETS = [{"pattern": NM(2, 4)}, {"pattern": NM(1, 4)}, *({"sparsities": [s]} for s in (0.01, "0.5", 0.63, 0.99))]
STEPPED = Preset("of a test", 3, Choice("omp"), {"0": Choice("wanda"), "0.6": Choice("wanda", {"scope": "block"})})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).eval()


@pytest.fixture
def data():
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture
def stepped(monkeypatch):
    monkeypatch.setitem(PRESETS, "stepped", STEPPED)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_plan_at_every_target(name, target):
    plan = pruners.build(name, **target).plan
    plan.check(Request(target.get("sparsities", ()), target.get("pattern")))
    assert plan.name in pruners.available() and plan.preset.startswith(f"{name}, version {PRESETS[name].version}: -p ")
    assert f"-p {plan.name}" in plan.preset


@pytest.mark.parametrize("target", [{"pattern": "2:4"}, {"sparsity": 0.5}], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_masks_are_those_of_what_it_stands_for(name, target, model, data):
    masks = pruners.prune(model, name, data=data, **target)
    choice = PRESETS[name].pattern if "pattern" in target else PRESETS[name].sparsities["0"]
    plain = pruners.prune(model, choice.pruner, data=data, **target, **choice.options)
    assert masks.digest() == plain.digest() and masks.weights.keys() == plain.weights.keys()
    assert all(torch.equal(masks.weights[layer], plain.weights[layer]) for layer in plain.weights)
    assert masks.provenance["preset"] == f"{name}, version {PRESETS[name].version}: {choice}"
    assert "preset" not in plain.provenance and masks.provenance["pruner"] == choice.pruner


def test_fast_reads_the_data_once_and_leaves_weights(model, data):
    engine = pruners.build("fast", sparsities=[0.5, 0.7])
    assert engine.plan.one_pass and not pruners.prune(model, "fast", sparsity=0.5, data=data).weights


def test_the_sparsity_chooses(stepped):
    assert pruners.build("stepped", pattern=NM(2, 4)).plan.name == "omp"
    assert pruners.build("stepped", sparsities=["0.59"]).plan.scope == "row"
    for sparsity in ("0.6", 0.6, Fraction(6, 10), "0.9"):
        plan = pruners.build("stepped", sparsities=[sparsity]).plan
        assert (plan.scope, plan.preset) == ("block", "stepped, version 3: -p wanda --scope block")
    assert pruners.build("stepped", sparsities=["0.6", 0.7, 0.8]).plan.scope == "block"


@pytest.mark.parametrize("target", [{}, {"sparsities": ["0.5", "0.7"]}], ids=str)
def test_targets_of_different_choices_are_runs_of_their_own(stepped, target):
    with pytest.raises(UserError, match="'stepped' stands for several pruners here .*--scope block.*one target at a"):
        pruners.build("stepped", **target)


def test_options_that_are_given_beat_the_preset(stepped):
    engine = pruners.build("stepped", sparsities=[0.7], scope="row", reconstruct="lsq", damp=0.1)
    assert engine.plan.scope == "row" and engine.plan.reconstruction.damp == 0.1
    assert engine.plan.preset == "stepped, version 3: -p wanda --scope row"
    assert pruners.build("stepped", sparsities=[0.7], scope=None).plan.scope == "block", "None is not given"
    assert pruners.build("best", sparsities=[0.7], damp=0.1).plan.reconstruction.damp == 0.1


def test_own_options_are_those_of_what_it_stands_for():
    given = {"damp": 0.1, "lambda_": 1e-4, "calibration_mode": "dense", "epochs": 3}
    assert pruners.own_options("best", given, sparsities=["0.5"]) == {"damp": 0.1, "calibration_mode": "dense"}
    assert pruners.own_options("fast", given, pattern=NM(2, 4)) == {"calibration_mode": "dense"}
    assert not pruners.updates("best") and not pruners.one_shot("alps") and pruners.one_shot("fast")


def test_presets_are_listed_apart_with_what_they_mean():
    assert list(pruners.presets()) == list(PRESETS) and not set(PRESETS) & set(pruners.available())
    assert all(f"{name} ({means})" in pruners.listed() for name, means in pruners.presets().items())
    assert all(name in pruners.listed() for name in pruners.available())
    pruners.check("best")
    for find in (pruners.check, pruners.build):
        with pytest.raises(UserError, match="there is no pruner 'fst', did you mean 'fast'"):
            find("fst")
    with pytest.raises(UserError, match="there is no pruner 'presets'"):
        pruners.build("presets")
