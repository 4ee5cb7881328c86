"""export.py of what other scripts write: fine-tuned results of every task and library, and learned masks."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

import captioning
import export
import image_classification
import maskllm_train
import models
import retrieval
import vqa
from configs.loading import load_config
from models.external import model as external
from sparsity.masks import Masks
from sparsity.pattern import NM
from tests.foreign import RUN_ONNX, expected, foreign, recorded
from tests.test_own_folder import CLASSES, FIXED, NEW, picture, toss
from tests.test_scripts import CONFIGS

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZES = {"xvlm": "model.yaml", "blip": "blip_model.yaml", "dino": "dino_model.yaml"}
RESULTS = [  # model, task, script, its configuration, parts
    ("xvlm", "captioning", captioning, "captioning.yaml", ["vision", "step"]),
    ("blip", "captioning", captioning, "blip_captioning.yaml", ["vision", "step"]),
    ("xvlm", "vqa", vqa, "vqa.yaml", ["vision", "question", "step"]),
    ("blip", "vqa", vqa, "blip_vqa.yaml", ["vision", "question", "step"]),
    ("xvlm", "retrieval", retrieval, "retrieval.yaml", ["vision", "text", "match"]),
    ("blip", "retrieval", retrieval, "blip_retrieval.yaml", ["vision", "text", "match"]),
    ("dino", "classification", image_classification, "dino_image_classification.yaml", ["classifier"]),
]
QUICK = (("xvlm", "vqa"),)
CPU = ["--accelerator", "cpu", "--precision", "32-true"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the parts of models that are written as ONNX in the test."""
    return recorded(monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of each class to train on, and one to validate on."""
    for label, name in enumerate(CLASSES):
        for place in ("train/0", "train/1", "val/0"):
            part, number = place.split("/")
            picture(tmp_path / "images" / part / name / f"{number}.png", 10 * label, 90 * label)
    return tmp_path / "images"


def masked(model: str, path: Path) -> Path:
    """Write a mask that prunes half of a two-layer model; return its path."""
    module = models.find(model)
    view = module.prunable_view(module.build(load_config(CONFIGS / SIZES[model], module.Config)))
    shapes = {name: tuple(weight.parameter.shape) for name, weight in view.weights.items()}
    toss(shapes, path)
    Masks(dict(Masks.load(path)), {"pruner": "toss"}, view.aliases).save(path)
    return path


def zeros(state: dict[str, torch.Tensor], masks: Masks) -> bool:
    """Whether exactly what the masks prune is zero."""
    return all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("model", "task", "script", "config", "parts"),
    [
        pytest.param(*case, id="-".join(case[:2]), marks=() if case[:2] in QUICK else pytest.mark.slow)
        for case in RESULTS
    ],
)
def test_a_result_of_fine_tuning(
    tmp_path: Path, graphs: list, capsys: pytest.CaptureFixture[str], model, task, script, config, parts
) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    mask = masked(model, tmp_path / "m.safetensors")
    given = ["--model", model, "--config", str(CONFIGS / config), "--mask", str(mask), "--output_dir", str(tuned)]
    script.main([*given, *CPU, "--skip_eval", "--debug"])
    export.main(["-m", model, "--task", task, "--weights", str(tuned / "result"), "-o", str(out)])
    told = capsys.readouterr().out
    assert all(f"{part}.onnx: " in told for part in parts) and told.count("bundled ") == len(parts), told
    state, held = load_file(out / "dense" / "model.safetensors"), Masks.load(tuned / "result" / "mask.safetensors")
    before = load_file(tuned / "result" / "model.safetensors")
    rebuilt = models.find(model).REBUILT  # momentum copies and queues, which no part reads
    kept = [name for name in before if not any(fnmatchcase(name, glob) for glob in (*rebuilt, "ptr_queue"))]
    assert zeros(state, held) and len(kept) > 30 and all(torch.equal(state[name], before[name]) for name in kept)
    names = expected(tmp_path, graphs)
    assert names == parts
    foreign(RUN_ONNX, tmp_path, *(out / "onnx" / f"{name}.onnx" for name in names))


IN_TIMM = """
import timm
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
found = model(load_file(sys.argv[2])["image"])
"""
IN_TRANSFORMERS = """
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
assert AutoImageProcessor.from_pretrained(sys.argv[1]).size["height"] == 16
found = model(load_file(sys.argv[2])["pixel_values"]).logits
"""
SAME = """
error = (found - load_file(sys.argv[2])["out.logits"]).abs().max()
assert error < 1e-4, error
"""


def round_trip(folder: Path, weights: list[str], graphs: list, load: str) -> Path:
    """Export what --model and --weights name, and run it elsewhere; return the dense folder."""
    out = folder / "out"
    export.main([*weights, "--formats", "dense,onnx", "-o", str(out)])
    assert expected(folder, graphs) == ["classifier"]
    foreign(load + SAME, out / "dense", folder / "classifier.safetensors")
    foreign(RUN_ONNX, folder, out / "onnx" / "classifier.onnx")
    return out / "dense"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "hf"])
def test_a_result_of_another_library(tmp_path: Path, images: Path, graphs: list, library: str) -> None:
    if library == "hf":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
        model, load = f"hf:{tmp_path / 'vit'}", IN_TRANSFORMERS
    else:
        untrained = tmp_path / "untrained"
        given = ["--model", "timm:vit_tiny_patch16_224", "--dataset", str(images), "--output_dir", str(untrained)]
        image_classification.main([*given, "--dense", "--epochs", "0", "--skip_eval", *FIXED, *NEW])
        model, load = f"timm:local-dir:{untrained / 'result'}", IN_TIMM
    weights = external.prunable_view(external.build(model)).weights
    mask = toss({name: tuple(weight.parameter.shape) for name, weight in weights.items()}, tmp_path / "m.safetensors")
    given = ["--model", model, "--dataset", str(images), "--output_dir", str(tmp_path / "tuned"), "--mask", str(mask)]
    image_classification.main([*given, "--epochs", "1", "--skip_eval", *FIXED])
    source = f"{model.partition(':')[0]}:{'local-dir:' if library == 'timm' else ''}{tmp_path / 'tuned' / 'result'}"
    dense = round_trip(tmp_path, ["-m", source], graphs, load)
    found = external.build(source.replace(str(tmp_path / "tuned" / "result"), str(dense))).state_dict()
    assert zeros(found, Masks.load(tmp_path / "tuned" / "result" / "mask.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "model.safetensors", "model_best.pth.tar"])
def test_learned_masks(tmp_path: Path, images: Path, graphs: list, file: str) -> None:
    model, sizes = timm.create_model("test_vit", img_size=32, num_classes=3), ["--img-size", "32", "--num-classes", "3"]
    weights = external.prunable_view(model).weights
    masks = {name: NM(2, 4).keep(torch.randn(weight.shape)) for name, weight in weights.items()}
    Masks(masks).save(tmp_path / "prior.safetensors")
    given = ["--model", "test_vit", *sizes, "--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run"]
    given += ["--accelerator", "cpu", "--workers", "0", "--batch-size", "3", "--epochs", "1", "--lr", "0.05"]
    maskllm_train.main([*given, "--mask-only", "--sparse-checkpoint", str(tmp_path / "prior.safetensors")])
    run = tmp_path / "run"
    source = ["-m", "timm:test_vit", "--weights", str(run / file)]
    source += ["--img_size", "32", "--model_kwargs", "num_classes=3"]
    state = load_file(round_trip(tmp_path, source, graphs, IN_TIMM) / "model.safetensors")
    assert zeros(state, Masks.load(run / "mask.safetensors"))
