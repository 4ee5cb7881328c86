"""The scripts on a two-layer BLIP: every pruner, comparison, pretraining that resumes, retrieval with a mask."""

import csv
import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import compare
import pretrain
import prune
import pruners
import retrieval
from configs.loading import load_config
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from models.blip import model as blip
from sparsity.allocation.budget import budget
from sparsity.masks import Masks
from tests.test_scripts import CONFIGS, SMALL, script

pytestmark = pytest.mark.script

CPU = ["--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a small run."""
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


@pytest.fixture(scope="module")
def view():
    return blip.prunable_view(blip.build(load_config(CONFIGS / "blip_model.yaml", blip.Config)))


def prune_options(folder, pruner, *options):
    config = str(CONFIGS / "blip_prune.yaml")
    return ["-m", "blip", "-p", pruner, "--config", config, "--output_dir", str(folder), *SMALL, *options]


@pytest.mark.parametrize("pruner", pruners.available())
def test_every_pruner_is_exact(tmp_path, view, pruner):
    prune.main(prune_options(tmp_path, pruner, "-s", "63"))
    masks = Masks.load(tmp_path / pruner / f"blip_{pruner}_63_seed42_pruning_masks.safetensors")
    masks.check(view)
    if pruners.build(pruner).plan.allocation.name == "global":
        assert masks.total - masks.kept == budget("0.63", masks.total)
    alias = "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
    assert alias in masks.aliases[alias.replace("text_decoder.bert.", "text_encoder.")]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_evaluation_and_two_processes(tmp_path):
    options = ["-s", "50", "--evaluate"]
    printed = script("prune.py", *prune_options(tmp_path / "one", "multiflow", *options)).stdout
    assert "i2t R@1" in printed and "vision %" in printed
    script("prune.py", *prune_options(tmp_path / "two", "multiflow", *options, "--devices", "2"))
    one, two = (next((tmp_path / n).rglob("*_masks.safetensors")) for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_comparison(tmp_path):
    options = ["-m", "blip", "-p", "omp,multiflow", "-s", "50", "--seeds", "1,2", "--num_batches", "2", *CPU]
    compare.main([*options, "--config", str(CONFIGS / "blip_prune.yaml"), "--output_dir", str(tmp_path)])
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["pruner"] for row in rows] == ["dense", "omp", "multiflow", "multiflow"]
    assert set(rows[0]) >= {"vision %", "text %", "i2t R@1"}


def test_pretraining_resumes_to_the_same_weights(tmp_path, monkeypatch):
    options = ["-m", "blip", "--config", str(CONFIGS / "blip_pretrain.yaml"), *CPU, "--output_dir"]
    pretrain.main([*options, str(tmp_path / "whole")])
    whole = load_file(tmp_path / "whole" / "blip.safetensors")
    assert all(tensor.isfinite().all() for tensor in whole.values())

    real, steps = torch.optim.AdamW.step, []

    @functools.wraps(real)  # with the mark that its hooks are called
    def stop_in_the_middle(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main([*options, str(tmp_path / "halted")])
    monkeypatch.setattr(torch.optim.AdamW, "step", real)
    pretrain.main([*options, str(tmp_path / "halted")])
    resumed = load_file(tmp_path / "halted" / "blip.safetensors")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    model = blip.build(load_config(CONFIGS / "blip_model.yaml", blip.Config), tmp_path / "whole" / "blip.safetensors")
    assert isinstance(model, blip.BLIP)


def test_retrieval_with_a_mask(tmp_path, view):
    prune.main(prune_options(tmp_path, "omp", "-s", "75"))
    mask = tmp_path / "omp" / "blip_omp_75_seed42_pruning_masks.safetensors"
    options = ["--model", "blip", "--mask", str(mask), "--config", str(CONFIGS / "blip_retrieval.yaml"), *CPU]
    retrieval.main([*options, "--output_dir", str(tmp_path / "tuned")])
    state, masks = load_file(tmp_path / "tuned" / "result" / "model.safetensors"), Masks.load(mask)
    for name in view.weights:
        if name in state:
            assert (state[name][~masks[name]] == 0).all() and (state[name][masks[name]] != 0).any()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_retrieval_on_two_processes(tmp_path):
    """Each matches half of the pairs; training gathers features and queues."""
    config = yaml.safe_load((CONFIGS / "blip_retrieval.yaml").read_text())
    for name, epochs in (("as_it_is", 0), ("trained", 1)):
        settings = config | {"scheduler": {"epochs": epochs}, "batch_size_train": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    def options(name, *more):
        given = ["--model", "blip", "--config", str(tmp_path / f"{name}.yaml"), *CPU]
        return [*given, "--output_dir", str(tmp_path / "-".join((name, *more[-1:]))), *more]

    retrieval.main(options("as_it_is", "--dense", "-d", "1"))
    script("retrieval.py", *options("as_it_is", "--dense", "-d", "2"))
    one, two = (tmp_path / f"as_it_is-{devices}" / "result" / "metrics.json" for devices in "12")
    assert one.read_bytes() == two.read_bytes()
    script("retrieval.py", *options("trained", "--dense", "--skip_eval", "-d", "2"))
    assert (tmp_path / "trained-2" / "result" / "model.safetensors").is_file()


def test_retrieval_with_the_configuration_of_the_full_size(tmp_path):
    """Only sizes, and where things are, are others."""
    export_public(tmp_path, 12, load_glyphs(), side=64)
    config = yaml.safe_load(Path("configs/blip/retrieval.yaml").read_text())
    for name in ("val_file", "test_file", "image_root"):
        config[name] = str(tmp_path / config[name])
    config["train_file"] = [str(tmp_path / file) for file in config["train_file"]]
    config |= {"model_config": str(CONFIGS / "blip_model.yaml"), "weights": "random", "image_res": 48, "workers": 1}
    config |= {"max_tokens": 16, "batch_size_train": 2, "batch_size_target": 4}
    config["scheduler"]["epochs"] = 1
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    options = ["--model", "blip", "--dense", "--config", str(tmp_path / "c.yaml"), "--debug", *CPU]
    retrieval.main([*options, "--output_dir", str(tmp_path / "out")])
    assert list(json.loads((tmp_path / "out/result/metrics.json").read_text())) == ["test"]
