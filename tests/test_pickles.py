"""Code in a pickle never runs, wherever a checkpoint, a mask, a snapshot, a prior, latents or a shard is read."""

import ast
import io
import json
import os
import pickle
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import maskllm_train
import oneshot_pruning_timm
import pack
import prune
import timm_validate
from datasets.bundled.generation import read_latents
from datasets.pairs.tars import open_shard, read_shard
from engine.training.checkpoint import load_checkpoint
from engine.training.mask_learning import read_prior
from models.blip import model as blip
from models.checkpoint import read_weights
from models.external import model as external
from models.external import timm_classifier
from models.xvlm import model as xvlm
from sparsity.masks import Masks
from tests import tiny_models
from tests.conftest import BLIP_CONFIG, CONFIG
from tests.tiny_models import VISION

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


class Code:
    """Unpickling this makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def planted(kind, path, marker, state=None):
    """A file with code in it, beside what is expected there."""
    state = {"a.weight": torch.zeros(2, 2)} if state is None else state
    code, content = Code(marker), {}
    if kind in ("zip", "legacy"):
        content = {"model": state, "state_dict": state, "step": code, "identity": {}, "optimizer": {}, "precision": {}}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "in the weights":
        torch.save({**state, "b.weight": code}, path)
    elif kind == "bare":
        path.write_bytes(pickle.dumps(code, protocol=2))
    else:
        np.save(path.open("wb"), np.array([code], dtype=object), allow_pickle=True)
    return path


KINDS = ("zip", "legacy", "in the weights", "bare", "numpy")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


def test_the_plant_works(tmp_path, marker):
    """The planted pickles do harm when they are loaded without care; these tests are worth nothing otherwise."""
    for i, kind in enumerate(KINDS):
        path = planted(kind, tmp_path / "x.pt", marker)
        if kind == "bare":
            pickle.loads(path.read_bytes())
        elif kind == "numpy":
            np.load(path, allow_pickle=True)
        else:
            torch.load(path, weights_only=False)
        assert marker.exists(), (i, kind)
        marker.unlink()


def timm_view():
    return external.prunable_view(timm.create_model("test_vit"))


READERS = {
    "--weights": read_weights,
    "--weights of xvlm": lambda path: xvlm.build(CONFIG, path),
    "--weights of blip": lambda path: blip.build(BLIP_CONFIG, path),
    "--weights of timm": lambda path: external.build("timm:test_vit", path),
    "--weights with a key": lambda path: external.build("timm:test_vit", path, "state_dict"),
    "--initial-checkpoint": lambda path: timm_classifier.load(timm.create_model("test_vit"), path),
    "--mask": Masks.load,
    "last.pt": lambda path: load_checkpoint(path, ("step", "identity")),
    "best.pt": lambda path: load_checkpoint(path, ("model",)),
    "--sparse-checkpoint": lambda path: read_prior(path, timm_view(), read_weights),
    "latents": lambda path: read_latents(path, SimpleNamespace(shape=(4, 8, 8), null_class=None, classes=3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_readers(tmp_path, marker, reader, kind):
    path = planted(kind, tmp_path / "x.pt", marker)
    with pytest.raises(ValueError, match="x.pt") as caught:
        READERS[reader](path)
    assert not marker.exists() and "\n" not in str(caught.value)


CPU = ["--accelerator", "cpu"]
SCRIPTS = {
    "prune.py": lambda path, out: prune.main(
        ["-m", "timm:test_vit", "-p", "omp", "--weights", path, "--output_dir", out, *CPU]
    ),
    "oneshot_pruning_timm.py": lambda path, out: oneshot_pruning_timm.main(
        ["--model", "test_vit", "--ckpt", path, "--pruner", "magnitude", "--data-path", "bundled", *CPU]
    ),
    "timm_validate.py": lambda path, out: timm_validate.main(
        ["--model", "test_vit", "--checkpoint", path, "--data-path", "bundled", *CPU]
    ),
    "timm_validate.py --mask": lambda path, out: timm_validate.main(
        ["--model", "vit_mini", "--pretrained", "--mask", path, "--data-path", "bundled", *CPU]
    ),
    "pack.py": lambda path, out: pack.main([path, f"{out}.safetensors"]),
    "maskllm_train.py": lambda path, out: maskllm_train.main(
        ["--model", "vit_mini", "--pretrained", "--sparse-checkpoint", path, "--mask-only", "--output", out, *CPU]
    ),
}


@pytest.mark.parametrize("kind", ["zip", "bare"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(tmp_path, marker, script, kind):
    path = planted(kind, tmp_path / "x.pt", marker)
    with pytest.raises(ValueError, match="x.pt"):
        SCRIPTS[script](str(path), str(tmp_path / "out"))
    assert not marker.exists()


# What libraries read


def vit(folder):
    torch.manual_seed(0)
    return tiny_models.save(transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)), folder)


@pytest.mark.parametrize("kind", ["zip", "legacy", "in the weights", "bare"])
def test_the_pickle_of_a_folder_of_transformers(tmp_path, marker, kind):
    folder = vit(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    planted(kind, folder / "pytorch_model.bin", marker, state)
    with pytest.raises(ValueError, match="no weights"):
        external.build(f"hf:{folder}")
    assert not marker.exists()


def test_code_that_comes_with_a_folder_of_transformers(tmp_path, marker):
    folder = vit(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    named = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForImageClassification": "own.Model"}
    for change in ({}, {"model_type": "foreign"}, {"architectures": ["Model"]}):
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": named, **change}))
        if change:
            with pytest.raises(ValueError, match=f"hf:{folder}"):
                external.build(f"hf:{folder}")
        else:
            external.build(f"hf:{folder}")
        assert not marker.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "in the weights", "bare"])
def test_the_pickle_of_published_weights_of_timm(tmp_path, marker, monkeypatch, kind):
    path = planted(kind, tmp_path / "pytorch_model.bin", marker, timm.create_model("test_vit").state_dict())
    monkeypatch.setattr(external, "_cached", lambda timm, name: str(path))
    with pytest.raises(ValueError, match="test_vit: "):
        external.build("timm:test_vit")
    assert not marker.exists()


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "cls", "mp", "ten"])
def test_members_of_a_shard(tmp_path, marker, extension):
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    code = planted("numpy" if extension in ("npy", "npz") else "bare", tmp_path / "code", marker).read_bytes()
    files = {"png": image.getvalue(), "txt": b"a dog", "json": b"{}", extension: code}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"0.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert open_shard(tmp_path / "00000.tar") == 1
    (sample,) = read_shard(tmp_path / "00000.tar")
    assert sample.caption == "a dog" and not marker.exists()


# No new place


def sources():
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True).stdout.split()
    return [Path(name) for name in listed if not name.startswith("tests/")]


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            yield f"{owner}.{node.func.attr}", {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_no_file_of_the_project_unpickles_what_it_has_not_pickled_itself():
    unpickled = []
    for path in sources():
        for name, options in calls(ast.parse(path.read_text())):
            if name == "torch.load":
                assert options.get("weights_only") == "True", path
            assert name not in ("np.load", "numpy.load") or options.get("allow_pickle", "False") == "False", path
            assert options.get("trust_remote_code", "False") == "False", path
            assert name not in ("pickle.load", "joblib.load", "dill.load", "dill.loads", "yaml.load"), path
            unpickled += [str(path)] if name == "pickle.loads" else []
    assert unpickled == ["datasets/annotations.py"], "which reads what is in its own memory"
