"""image_classification.py with classifiers of timm and transformers on a folder of class folders, end to end."""

import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

import image_classification
import timm_validate
from models.external.timm_classifier import data_config, transform
from sparsity.masks import Masks
from tests.processes import PATIENCE
from tests.test_finetuning import log_rows, zeros
from tests.test_scripts import early, refused, script, without_torch  # noqa: F401

pytestmark = pytest.mark.script

CLASSES = ["a 2", "a 10", "Bee"]  # as labels count them: numbers by their value, letters whatever their case
SIZES = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8}
NEW = ["--weights", "random", "--model_kwargs", ",".join(f"{name}={value}" for name, value in SIZES.items())]
FIXED = ["--accelerator", "cpu", "--precision", "32-true", "--workers", "0", "--batch_size", "6", "--lr", "0.003"]


def picture(path, seed, light):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(light, light + 60, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images to train on and four to validate on of each class, which their light tells apart."""
    root = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        for part, count in {"train": 6, "val": 4}.items():
            for i in range(count):
                picture(root / part / name / f"{i}.png", 100 * label + 10 * (part == "val") + i, 90 * label)
    return root


def options(folder, out, *more, model, mask=None, epochs=2):
    kind = ["--mask", str(mask)] if mask else ["--dense"]
    given = ["--model", model, "--dataset", str(folder), "--output_dir", str(out), "--epochs", str(epochs), *kind]
    return [*given, *FIXED, *more]


def tuned(folder, out, *more, **kind):
    image_classification.main(options(folder, out, *more, **kind))
    return out / "result"


def metrics_of(result):
    return json.loads((result / "metrics.json").read_text())


def toss(names, path, seed=0):
    """A mask that keeps half of weights {name: shape}."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) > 0.5 for name, shape in names.items()}
    Masks(masks, {"pruner": "toss", "sparsity": "0.5", "seed": seed}).save(path)
    return path


def prunable(result, inside):
    weights = load_file(result / "model.safetensors")
    return {name: tuple(t.shape) for name, t in weights.items() if inside in name and t.ndim == 2}


def right(model, prepare, folder):
    """The share of the images of val/ that a plain model gets right, in per cent."""
    found = []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / "val" / name).iterdir()):
            with torch.no_grad(), Image.open(path) as image:
                logits = model(prepare(image.convert("RGB"))[None])
            found.append(int(getattr(logits, "logits", logits).argmax()) == label)
    return 100 * sum(found) / len(found)


@pytest.fixture(scope="module")
def dense(folder, tmp_path_factory):
    """A two-layer ViT of timm, trained dense from random weights: its result."""
    return tuned(folder, tmp_path_factory.mktemp("dense"), *NEW, model="timm:vit_tiny_patch16_224", epochs=8)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A two-layer ViT of transformers as from the hub, whose labels have the names of the folder in another order."""
    path = tmp_path_factory.mktemp("hf") / "vit"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = dict(enumerate(reversed(CLASSES)))
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, id2label=names)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


# timm


def test_the_result_is_a_model_of_timm(dense, folder):
    """Plain timm and timm_validate.py find in it the accuracy that the run has reported, more than luck."""
    model = timm.create_model(f"local-dir:{dense}", pretrained=True).eval()
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == CLASSES
    assert json.loads((dense / "classes.json").read_text()) == {name: i for i, name in enumerate(CLASSES)}
    top1 = metrics_of(dense)["test"]["top1"]
    assert top1 > 60
    assert right(model, transform(data_config(model)), folder) == pytest.approx(top1)


def test_timm_validate_reads_the_result(dense, folder, capsys):
    given = ["--model", f"local-dir:{dense}", "--pretrained", "--data-path", str(folder), "--accelerator", "cpu"]
    timm_validate.main(given)
    told = json.loads(capsys.readouterr().out)
    assert told["top1"] == pytest.approx(metrics_of(dense)["test"]["top1"], abs=1e-3)


def test_a_pruned_model_of_timm(dense, folder, tmp_path):
    mask = toss(prunable(dense, "blocks."), tmp_path / "mask.safetensors")
    result = tuned(folder, tmp_path / "out", "--mixup", "0.5", model=f"timm:local-dir:{dense}", mask=mask)
    assert zeros(result)
    own, given = Masks.load(result / "mask.safetensors"), Masks.load(mask)
    assert all(torch.equal(own[name], given[name]) for name in given)
    card = (result / "README.md").read_text()
    assert f"base model: timm:local-dir:{dense}, weights: published" in card


def test_a_head_is_kept_by_its_names_alone(dense, folder, tmp_path):
    """Nothing is trained: weights are as they were, but for a head whose classes have no names or others."""
    before = load_file(dense / "model.safetensors")
    sized = NEW[2:]
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((dense / "model.safetensors").read_bytes())
    ways = {
        "named": (f"timm:local-dir:{dense}", [], True),
        "beside": ("timm:vit_tiny_patch16_224", [*sized, "--weights", str(dense / "model.safetensors")], True),
        "bare": ("timm:vit_tiny_patch16_224", [*sized, "--weights", str(bare)], False),
        "told": ("timm:vit_tiny_patch16_224", [*sized, "--weights", str(bare), "--keep_head"], True),
    }
    for name, (model, more, kept) in ways.items():
        result = tuned(folder, tmp_path / name, *more, "--skip_eval", model=model, epochs=0)
        after = load_file(result / "model.safetensors")
        assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("head.")), name
        assert torch.equal(after["head.weight"], before["head.weight"]) == kept, name


# transformers


def test_the_result_is_a_model_of_transformers(vit, folder, tmp_path):
    """A head of the same names is kept, in the order of the folder; plain transformers measures what the run has."""
    before = transformers.ViTForImageClassification.from_pretrained(vit)
    still = tuned(folder, tmp_path / "still", model=f"hf:{vit}", epochs=0)
    model = transformers.AutoModelForImageClassification.from_pretrained(still)
    assert [model.config.id2label[i] for i in range(3)] == CLASSES
    assert torch.equal(model.classifier.weight, before.classifier.weight.flip(0))
    again = tuned(folder, tmp_path / "file", "--weights", str(still / "model.safetensors"), model=f"hf:{vit}", epochs=0)
    assert (again / "model.safetensors").read_bytes() == (still / "model.safetensors").read_bytes()
    result = tuned(folder, tmp_path / "out", model=f"hf:{vit}", epochs=8)
    model = transformers.AutoModelForImageClassification.from_pretrained(result).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(result)

    def prepare(image):
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    top1 = metrics_of(result)["test"]["top1"]
    assert top1 > 60 and right(model, prepare, folder) == pytest.approx(top1)


def test_a_pruned_model_of_transformers(vit, folder, tmp_path):
    """The mask of the pretrained model, for other classes than it has: a new head, the mask held."""
    model = transformers.ViTForImageClassification.from_pretrained(vit)
    shapes = {f"{n}.weight": m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del shapes["classifier.weight"]
    mask = toss(shapes, tmp_path / "mask.safetensors")
    fewer = tmp_path / "fewer"
    for part in ("train", "val"):
        for name in CLASSES[:2]:
            (fewer / part).mkdir(parents=True, exist_ok=True)
            (fewer / part / name).symlink_to(folder / part / name)
    result = tuned(fewer, tmp_path / "out", model=f"hf:{vit}", mask=mask)
    again = transformers.AutoModelForImageClassification.from_pretrained(result)
    weights, held = again.state_dict(), Masks.load(result / "mask.safetensors")
    assert set(held) == set(shapes)
    for name, kept in held.items():
        assert bool((weights[name][~kept] == 0).all()) and bool((weights[name][kept] != 0).all())
    assert again.classifier.weight.shape == (2, 16) and again.config.id2label == dict(enumerate(CLASSES[:2]))


# DINO


def test_the_bundled_model_on_a_folder(folder, tmp_path):
    """Its 76 classes are not the folder's: the head is new; that of the result is the folder's, and kept."""
    first = tuned(folder, tmp_path / "first", model="dino", epochs=1)
    more = ["--variant", "mini", "--weights", str(first / "model.safetensors"), "--skip_eval"]
    again = tuned(folder, tmp_path / "again", *more, model="dino", epochs=0)
    before, after = (load_file(result / "model.safetensors") for result in (first, again))
    assert before["classifier.weight"].shape[0] == 3
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])


# Stopped, killed, in two processes


def train(arguments, said):
    """In a process of its own."""
    torch.set_num_threads(1)
    with said.open("w") as sys.stderr:
        image_classification.main(arguments)


def written(path, **change):
    config = yaml.safe_load(Path("configs/external/image_classification.yaml").read_text()) | change
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.multiprocess
@pytest.mark.parametrize("library", ["timm", "hf"])
def test_killed_it_ends_with_the_same_bits(library, dense, vit, folder, tmp_path):
    """With mixing, a new rate in each step, and images drawn anew."""
    torch.set_num_threads(1)
    model = f"timm:local-dir:{dense}" if library == "timm" else f"hf:{vit}"
    config = written(tmp_path / "c.yaml", save_every=2, log_every=1)
    more = ["--config", str(config), "--mixup", "0.4", "--cutmix", "0.4"]
    whole = tuned(folder, tmp_path / "whole", *more, model=model, epochs=12)
    cut = tmp_path / "cut"
    arguments = options(folder, cut, *more, model=model, epochs=12)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=train, args=(arguments, tmp_path / "said"))
    process.start()
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline and not (cut / "last.pt").is_file():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()[-2000:]
    assert 0 < torch.load(cut / "last.pt", weights_only=True)["step"] < 36
    result = tuned(folder, cut, *more, model=model, epochs=12)
    for name in ("model.safetensors", "metrics.json"):
        assert (result / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow  # tests/test_sparse_product.py has all kinds of models on two processes
@pytest.mark.multiprocess
def test_losses_do_not_depend_on_the_number_of_processes(vit, folder, tmp_path):
    """There is no dropout: six images in a step, two times three in turn or side by side."""
    more = ["--batch_size_train", "3", "--skip_eval"]
    model = f"hf:{vit}"
    tuned(folder, tmp_path / "one", *more, model=model)
    script("image_classification.py", *options(folder, tmp_path / "two", *more, "-d", "2", model=model))
    one, two = ([float(row[2]) for row in log_rows(tmp_path / n) if row[1] == "loss"] for n in ("one", "two"))
    assert one and two == pytest.approx(one, rel=2e-5)


# What cannot be


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--model", "timm:x"], "give --dataset FOLDER"),
        (["--model", "timm:x", "--dataset", "imagenet"], "got 'data/imagenet', which is no folder"),
        (["--model", "timm:x", "--dataset", "absent"], "--dataset: invalid choice: 'absent'"),
        (["--model", "timm:x", "--dataset", "cifar10", "--val_fraction", "0.1"], "leave it out with cifar10"),
        (["--model", "timm:x", "--dataset", ".", "--val_fraction", "1.5"], "--val_fraction: expected a fraction"),
        (["--model", "timm:x", "--dataset", ".", "--weights", "w.pt"], "--weights w.pt: there is no such file"),
        (["--model", "timm:x", "--dataset", ".", "--variant", "base"], "leave it out with timm:x"),
        (["--model", "timm:x", "--dataset", ".", "--scale", "0.5", "0.2"], "the smaller one first, got [0.5, 0.2]"),
        (["--model", "hf:x", "--dataset", ".", "--image_size", "32"], "--image_size is for models of timm: leave"),
        (["--mixup", "0.2"], "--mixup is for models of timm and transformers: leave it out with dino"),
        (["--pretrained"], "--pretrained is for models of timm and transformers: leave it out with dino"),
        (["--model", "resnet:make", "--dataset", "."], "there is no classification with the model 'resnet:make'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_heavy_imports(tmp_path, without_torch, given, told):  # noqa: F811
    first = ["image_classification.py", "--dense", "--output_dir", str(tmp_path / "out")]
    assert told in early([*first, *given], without_torch)
    assert not list(tmp_path.iterdir())


def test_models_and_weights_that_are_not_to_be_had(folder, tmp_path, capsys):
    def told(model, *more):
        return refused(capsys, image_classification.main, options(folder, tmp_path / "o", *more, model=model))

    assert "timm has no such model, did you mean timm:" in told("timm:vit_tiny_patch16_225")
    assert "no config.json of timm in this folder" in told(f"timm:local-dir:{tmp_path}")
    assert f"--model hf:{tmp_path / 'none'}" in told(f"hf:{tmp_path / 'none'}")
    assert "--optimizer nosuch" in told("timm:vit_tiny_patch16_224", *NEW, "--optimizer", "nosuch")
    torch.save({"state_dict": {"x": torch.zeros(2)}}, tmp_path / "w.pt")
    assert "weights of another model" in told(
        "timm:vit_tiny_patch16_224", *NEW[2:], "--weights", str(tmp_path / "w.pt")
    )


# Sparse training


@pytest.mark.parametrize(("library", "way"), [("timm", "gradual"), ("timm", "lora"), ("hf", "distill")])
def test_sparse_training(library, way, dense, vit, folder, tmp_path):
    """Zeros are where the mask of the result is, as its library loads it. All: tests/test_sparse_product.py."""
    if library == "timm":
        model, shapes = f"timm:local-dir:{dense}", prunable(dense, "blocks.")
    else:
        model, names = f"hf:{vit}", transformers.ViTForImageClassification.from_pretrained(vit).named_modules()
        shapes = {f"{n}.weight": m.weight.shape for n, m in names if isinstance(m, torch.nn.Linear)}
        del shapes["classifier.weight"]
    mask = toss(shapes, tmp_path / "mask.safetensors")
    kind = {"gradual": ["--gradual", "75"], "distill": ["--distill", "0.5"], "lora": ["--lora", "2"]}[way]
    result = tuned(folder, tmp_path / "out", *kind, model=model, mask=None if way == "gradual" else mask, epochs=4)
    held = Masks.load(result / "mask.safetensors")
    if library == "timm":
        weights = timm.create_model(f"local-dir:{result}", pretrained=True).state_dict()
    else:
        weights = transformers.AutoModelForImageClassification.from_pretrained(result).state_dict()
    assert set(held) == set(shapes)
    assert all(bool((weights[name][~kept] == 0).all()) for name, kept in held.items())
    pruned = sum(int((~kept).sum()) for kept in held.values()) / held.total
    assert pruned == pytest.approx(0.75, abs=1e-3) if way == "gradual" else 0.4 < pruned < 0.6
