"""Reading of checkpoints and writing them back: averaged weights, dtypes, and what is said of both."""

import json

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import maskllm_train
import oneshot_pruning_timm
import pack
import prune
import timm_validate
from engine.export import save_model, save_weights
from models.checkpoint import load_weights, read_weights
from models.external import model as external
from models.external import timm_classifier
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests import tiny_models
from tests.tiny_models import VISION

pytestmark = pytest.mark.usefixtures("no_network")
QUICK = ["--accelerator", "cpu", "--num_batches", "2", "--batch_size", "3", "-s", "50"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


# Averaged weights


def states(count):
    """State dicts of a small model of timm that differ."""
    for seed in range(count):
        torch.manual_seed(seed)
        yield timm.create_model("test_vit", num_classes=5).state_dict()


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    "keys", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict",), ("model_ema",)]
)
def test_weights_are_those_that_timm_takes_and_it_is_said(tmp_path, caplog, keys):
    content = dict(zip(keys, states(len(keys)), strict=True))
    torch.save({"epoch": 3, "arch": "test_vit", **content}, tmp_path / "c.pth.tar")
    model = timm_classifier.build("test_vit", pretrained=False, num_classes=5)
    expected = timm.models.load_state_dict(str(tmp_path / "c.pth.tar"))
    timm_classifier.load(model, tmp_path / "c.pth.tar")
    assert same(model.state_dict(), expected) and same(expected, content[keys[-1]])
    told = f"c.pth.tar: read the weights under {keys[-1]!r}; it also has {keys[0]!r}"
    assert (told in caplog.text) == (len(keys) > 1)
    for key in keys:
        timm_classifier.load(model, tmp_path / "c.pth.tar", key=key)
        assert same(model.state_dict(), content[key])
        raw = timm_classifier.read(tmp_path / "c.pth.tar", ema=key.endswith("ema"))
        assert same(raw, content[key])


def test_a_key_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    raw, averaged = states(2)
    torch.save({"state_dict": raw, "mine": averaged, "epoch": 3}, tmp_path / "c.pth")
    assert same(read_weights(tmp_path / "c.pth", key="mine"), averaged)
    with pytest.raises(ValueError, match="c.pth: has no weights under 'yours'; it has 'state_dict', 'mine'"):
        read_weights(tmp_path / "c.pth", key="yours")
    with pytest.raises(ValueError, match="c.pth: has no weights under 'epoch'"):
        read_weights(tmp_path / "c.pth", key="epoch")
    save_file(raw, tmp_path / "bare.safetensors")
    with pytest.raises(
        ValueError, match="has no weights under 'mine'; it has no key with weights: they stand there bare"
    ):
        read_weights(tmp_path / "bare.safetensors", key="mine")


@pytest.mark.parametrize(("given", "key"), [([], "state_dict_ema"), (["--weights_key", "state_dict"], "state_dict")])
def test_the_key_by_command(tmp_path, given, key):
    whole = timm.create_model("test_vit").state_dict()
    content = {
        name: {**whole, **state} for name, state in zip(("state_dict", "state_dict_ema"), states(2), strict=True)
    }
    content = {
        name: {**state, **{n: whole[n] for n in whole if n.startswith("head.")}} for name, state in content.items()
    }
    torch.save(content, tmp_path / "c.pth.tar")
    options = ["-m", "timm:test_vit", "-p", "omp", "--save_model", *QUICK, "--output_dir", str(tmp_path / "out")]
    prune.main([*options, "--weights", str(tmp_path / "c.pth.tar"), *given])
    (saved,) = (tmp_path / "out" / "omp").glob("*_model.safetensors")
    for name, tensor in load_file(saved).items():
        assert torch.equal(tensor, content[key][name] * (tensor != 0))


def test_a_key_without_a_file_is_refused(tmp_path):
    options = ["-m", "timm:test_vit", "-p", "omp", *QUICK, "--output_dir", str(tmp_path), "--weights", "random"]
    with pytest.raises(ValueError, match="--weights_key x: is a key of a file"):
        prune.main([*options, "--weights_key", "x"])
    with pytest.raises(ValueError, match="--weights-key x: is a key of --ckpt"):
        oneshot_pruning_timm.main(["--model", "test_vit", "--weights-key", "x"])


# Dtypes


def dtypes_of(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)


def classifier():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_a_saved_model_of_transformers_has_the_dtype_of_its_source(tmp_path, dtype, pickled):
    model = classifier().to(dtype)
    folder = tiny_models.save(model, tmp_path / "dense")
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    prune.main(["-m", f"hf:{folder}", "-p", "omp", "--save_model", *QUICK, "--output_dir", str(tmp_path / "out")])
    (saved,) = (tmp_path / "out" / "omp").glob("*_model")
    (masks,) = (tmp_path / "out" / "omp").glob("*_masks.safetensors")
    assert set(dtypes_of(saved / "model.safetensors").values()) == {DTYPES[dtype]}
    again, masks = transformers.ViTForImageClassification.from_pretrained(saved), Masks.load(masks)
    assert again.dtype == dtype and json.loads((saved / "config.json").read_text())["dtype"] == str(dtype)[6:]
    for name, tensor in again.state_dict().items():
        expected = model.state_dict()[name]
        assert torch.equal(tensor, expected * masks[name] if name in masks else expected), name


def test_tensors_that_differ_in_dtype_keep_their_own(tmp_path):
    folder = tiny_models.save(classifier().bfloat16(), tmp_path / "dense")
    state = load_file(folder / "model.safetensors")
    mixed = {name: tensor.float() if "layernorm" in name else tensor for name, tensor in state.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    model, halves = external.load(f"hf:{folder}")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    view = external.prunable_view(model, halves=halves)
    save_model(model, tmp_path / "saved", view.halves)
    kept = dtypes_of(tmp_path / "saved" / "model.safetensors")
    assert kept == {name: "F32" if "layernorm" in name else "BF16" for name in mixed}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}, "in memory nothing has changed"
    assert model.config.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_saved_weights_of_timm_have_the_dtype_of_their_file(tmp_path, dtype, suffix):
    state = timm.create_model("test_vit").to(dtype).state_dict()
    torch.save(state, tmp_path / "w.pt")
    out = str(tmp_path / "out")
    prune.main(
        [
            "-m",
            "timm:test_vit",
            "--weights",
            str(tmp_path / "w.pt"),
            "-p",
            "omp",
            "--save_model",
            *QUICK,
            "--output_dir",
            out,
        ]
    )
    (saved,) = (tmp_path / "out" / "omp").glob("*_model.safetensors")
    assert set(dtypes_of(saved).values()) == {DTYPES[dtype]}
    path = tmp_path / f"oneshot{suffix}"
    given = ["--model", "test_vit", "--ckpt", str(tmp_path / "w.pt"), "--data-path", "bundled", "--skip-eval"]
    given += ["--pruner", "magnitude", "--save-model", str(path), "--accelerator", "cpu"]
    if dtype == torch.float64:  # the test below
        return
    oneshot_pruning_timm.main(given)
    found = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(tensor, state[name] * (tensor != 0)) for name, tensor in found.items())


@pytest.mark.parametrize("script", ["oneshot", "validate", "maskllm"])
def test_weights_of_float64_are_refused_where_they_would_be_rounded(tmp_path, script):
    """And the command that the message gives makes weights that are taken."""
    for image in ("train/a/0.png", "train/b/0.png", "val/a/0.png"):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / image)
    state = timm.create_model("test_vit", num_classes=2, img_size=32).double().state_dict()
    path, rounded = tmp_path / "w.safetensors", tmp_path / "r.safetensors"
    save_file(state, path)
    given = ["--model", "test_vit", "--num-classes", "2", "--img-size", "32", "--data-path", str(tmp_path)]
    given += ["--accelerator", "cpu", "--workers", "0"]
    pruned = tmp_path / "p.safetensors"

    def run(weights):
        if script == "oneshot":
            more = ["--pruner", "magnitude", "--skip-eval", "--save-model", str(pruned)]
            oneshot_pruning_timm.main([*given, "--ckpt", str(weights), *more])
        elif script == "validate":
            timm_validate.main([*given, "--checkpoint", str(weights)])
        else:
            more = ["--initial-checkpoint", str(weights), "--mask-only", "--steps", "1", "--batch-size", "2"]
            maskllm_train.main([*given, *more, "--output", str(tmp_path / "learned")])

    with pytest.raises(UserError, match=r"w.safetensors: \d+ tensors are of float64.*--dtype float32") as refused:
        run(path)
    assert not pruned.exists() and "\n" not in str(refused.value)
    pack.main([str(path), str(rounded), "--dtype", "float32"])
    run(rounded)
    if script == "oneshot":
        found = load_file(pruned)
        assert all(torch.equal(tensor, state[name].float() * (tensor != 0)) for name, tensor in found.items())


def double():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()


def half():
    return double().half()


HERE = "tests.models.external.test_sources"


def batches():
    return [(torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)]


def test_a_models_own_dtype_is_narrowed_nowhere(tmp_path):
    model, halves = external.load(f"{HERE}:double")
    assert model[0].weight.dtype == torch.float64 and not halves
    assert dtypes_of(save_weights(model, tmp_path / "w.safetensors")) == {
        "0.weight": "F64",
        "0.bias": "F64",
        "1.weight": "F64",
        "1.bias": "F64",
    }
    model, halves = external.load(f"{HERE}:half")
    assert model[0].weight.dtype == torch.float32 and set(halves.values()) == {torch.float16}
    assert set(dtypes_of(save_model(model, tmp_path / "h", halves)).values()) == {"F16"}


@pytest.mark.parametrize(("make", "kind"), [("double", "F64"), ("half", "F16")])
def test_updated_weights_have_the_dtype_of_the_source(tmp_path, make, kind, monkeypatch):
    data = ["--calibration", f"{HERE}:{'batches' if make == 'double' else 'single'}", "--exclude", "1"]
    out = ["--output_dir", str(tmp_path / "out")]
    prune.main(["-m", f"{HERE}:{make}", "-p", "sparsegpt", "--enable_update", *QUICK, *data, *out])
    (updated,) = (tmp_path / "out" / "sparsegpt").glob("*_weights.safetensors")
    assert dtypes_of(updated) == {"0.weight": kind}


def single():
    return [tuple(tensor.float() for tensor in batch) for batch in batches()]


def test_narrowing_is_said(caplog):
    model = nn.Linear(2, 2)
    load_weights(model, "w.pt", weights={"weight": torch.ones(2, 2, dtype=torch.float64), "bias": torch.ones(2)})
    assert "w.pt: 1 tensors are narrowed, from torch.float64 to torch.float32: weight" in caplog.text
