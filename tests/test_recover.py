"""prune.py --recover on a small model of every kind."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import prune
from configs.loading import load_config
from models.dit import model as dit
from models.external import model as external
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.run.memory import Memory
from tests import tiny_models
from tests.test_dino_scripts import script
from tests.tiny_models import image_processor, tokenizer

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]

CONFIGS = Path("tests/data/configs")
CONFIGURED = {"dino": "dino_prune.yaml", "xvlm": "prune.yaml", "blip": "blip_prune.yaml", "dit": "dit_prune.yaml"}
QUICK = ["--accelerator", "cpu", "-s", "50", "--recover", "6", "--recover_rounds", "2", "--recover_save_every", "4"]
# A bias of each, of a norm where it has any.
BIASES = {
    "dino": "vit.layernorm.bias",
    "xvlm": "text_encoder.bert.encoder.layer.0.output.LayerNorm.bias",
    "blip": "text_encoder.encoder.layer.0.output.LayerNorm.bias",
    "dit": "t_embedder.mlp.0.bias",
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


def arguments(folder, model, *options, pruner="omp"):
    config = ["--config", str(CONFIGS / CONFIGURED[model])] if model in CONFIGURED else []
    return ["-m", model, "-p", pruner, "--output_dir", str(folder), "--num_batches", "10", *config, *options]


def pruned(folder, model, *options, pruner="omp"):
    prune.main(arguments(folder, model, *options, pruner=pruner))
    return folder / pruner


def one(folder, glob):
    (path,) = folder.glob(glob)
    return path


def check(folder, evaluated=True):
    """The zeros of the masks are in what was recovered; the best is not worse than the start. Returns both."""
    masks = Masks.load(one(folder, "*_50_seed42_pruning_masks.safetensors"))
    file = one(folder, "*_50_seed42_recovered.safetensors")
    weights = load_file(file)
    assert set(masks) <= set(weights)
    assert all(not weights[name][~mask].any() and weights[name][mask].any() for name, mask in masks.items())
    report = (folder / "report.md").read_text()
    before, after = map(float, re.search(r"held-out loss (\S+) -> (\S+),", report).groups())
    assert after < before and file.name in report and "held out (seed 42)" in report
    rows = [line.split("|")[1].strip() for line in report.split("\n") if line.startswith("| ")]
    assert [row for row in rows if row.startswith(("dense", "50"))] == ["dense"] * evaluated + ["50", "50 recovered"]
    assert [path.name for path in one(folder, "*_recovery").iterdir()] == ["log.csv"]
    return masks, weights


def weights_of(model, folder):
    """Random weights; of a diffusion transformer not those of its beginning, whose outputs are all zero."""
    if model != "dit":
        return []
    torch.manual_seed(0)
    state = dit.build(load_config(CONFIGS / "dit_model.yaml", dit.Config)).state_dict()
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    save_file(state, folder / "dit.safetensors")
    return ["--weights", str(folder / "dit.safetensors")]


@pytest.mark.parametrize("model", CONFIGURED)
def test_every_kind_of_the_projects_models(tmp_path, model):
    """Although the pruner itself reads no data; the masks are what they are without recovery."""
    given = weights_of(model, tmp_path)
    folder = pruned(tmp_path / "recovered", model, *QUICK, *given, "--evaluate", "--save_model")
    masks, weights = check(folder)
    plain = pruned(tmp_path / "plain", model, "--accelerator", "cpu", "-s", "50", *given)
    assert Masks.load(one(plain, "*_masks.safetensors")).digest() == masks.digest()
    recovered = load_file(one(folder, "*_50_seed42_recovered_model.safetensors"))
    before = load_file(one(folder, "*_50_seed42_model.safetensors"))
    assert all(torch.equal(recovered[name], tensor) for name, tensor in weights.items())
    bias = BIASES[model]
    assert bias in weights and not torch.equal(recovered[bias], before[bias])


def test_several_sparsities_with_an_update_of_the_weights(tmp_path):
    options = [*QUICK, "-s", "50,75", "--evaluate"]
    folder = pruned(tmp_path, "dino", *options, "--reconstruct", "lsq", pruner="sparsegpt")
    rows = re.findall(r"^\| (\S+(?: recovered)?) ", (folder / "report.md").read_text(), re.MULTILINE)
    assert [row for row in rows if "-" not in row][1:6] == ["dense", "50", "50 recovered", "75", "75 recovered"]
    for sparsity in (50, 75):
        masks = Masks.load(one(folder, f"*_{sparsity}_seed42_pruning_masks.safetensors"))
        weights = load_file(one(folder, f"*_{sparsity}_seed42_recovered.safetensors"))
        assert all(not weights[name][~mask].any() for name, mask in masks.items())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images with captions."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo : w{20 + i}")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    return tiny_models.save(tiny_models.clip(), tmp_path_factory.mktemp("models") / "clip", processor)


def test_a_model_of_timm(tmp_path, photos):
    data = ["--calibration", str(photos), "--weights", "random", "--batch_size", "3"]
    _, weights = check(pruned(tmp_path, "timm:test_vit", *QUICK, *data), evaluated=False)
    assert {"norm.bias", "head.weight", "head.bias"} <= set(weights)


def test_a_two_tower_model_of_transformers(tmp_path, clip, photos):
    folder = pruned(tmp_path, f"hf:{clip}", *QUICK, "--calibration", str(photos), "--batch_size", "3", "--save_model")
    _, weights = check(folder, evaluated=False)
    saved = external.build(f"hf:{one(folder, '*_recovered_model')}").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    assert any(name.startswith("text_model.") for name in weights) and "visual_projection.weight" in weights


def test_without_data_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--calibration, a folder of images"):
        pruned(tmp_path, "timm:test_vit", *QUICK, "--weights", "random")


def test_where_its_copies_do_not_fit_it_is_refused(tmp_path, monkeypatch):
    """The dense model, gradients and two moments: four times the bytes of the parameters."""
    monkeypatch.setattr("engine.pruning.free_memory.free_on_host", lambda: 10**9)
    monkeypatch.setattr("engine.recovery.recovery.needed_memory", lambda view: Memory(0, 10**9 + 1))
    with pytest.raises(UserError, match="--recover needs 1 GB on the host.*leave it out"):
        pruned(tmp_path, "dino", *QUICK)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("model", ["dino", "xvlm"])
def test_two_processes_recover_what_one_does(tmp_path, model):
    folder = pruned(tmp_path / "one", model, *QUICK)
    script("prune.py", *arguments(tmp_path / "two", model, *QUICK, "--devices", "2"))
    ours, theirs = (
        load_file(one(each, "*_50_seed42_recovered.safetensors")) for each in (folder, tmp_path / "two" / "omp")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # A step of Adam has the size of the rate, also where a gradient is but rounding: 6 of at most 1e-3.
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_half_precision(tmp_path):
    check(pruned(tmp_path, "xvlm", *QUICK, "--precision", "bf16-mixed"), evaluated=False)
