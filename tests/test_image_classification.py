"""image_classification.py end to end on a two-layer model, on every kind of data; CIFAR as torchvision reads it."""

import hashlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import image_classification
import maskllm_train
import oneshot_pruning_timm
import timm_validate
from configs.finetuning import ClassificationConfig
from configs.loading import load_config
from configs.task import OptimizerConfig
from datasets.labelled.cifar import READERS, CifarDataset
from datasets.transforms import EvalTransform, to_tensor
from engine.training.optimizer import finetuning_optimizer
from models.dino import classification as dino_classification
from models.dino import model as dino
from sparsity.masks import Masks
from tests.evaluating import check_evaluation
from tests.processes import only_bars
from tests.test_finetuning import log_rows, zeros
from tests.test_scripts import CONFIGS, early, refused, script, without_torch  # noqa: F401

pytestmark = pytest.mark.script

CONFIG = CONFIGS / "dino_image_classification.yaml"
SIZES = load_config(CONFIGS / "dino_model.yaml", dino.Config)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A checkpoint of the pretrained model and a mask of it: {"weights", "mask"}, paths."""
    folder = tmp_path_factory.mktemp("trunk")
    torch.manual_seed(0)
    model = dino.build(SIZES)
    torch.save({"model": model.state_dict()}, folder / "w.pth")
    view = dino.prunable_view(model)
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(w.parameter.shape, generator=generator) > 0.7 for name, w in view.weights.items()}
    Masks(masks, {"pruner": "toss", "sparsity": "0.7", "seed": 42}).save(folder / "mask.safetensors")
    return {"weights": folder / "w.pth", "mask": folder / "mask.safetensors"}


def options(folder, trunk, *more, config=CONFIG, dense=False):
    kind = ["--dense"] if dense else ["-m", str(trunk["mask"])]
    given = ["--config", str(config), "--output_dir", str(folder), *kind, "-pre", str(trunk["weights"])]
    return [*given, "--accelerator", "cpu", "--precision", "32-true", *more]


def tuned(folder, trunk, *more, **kind):
    image_classification.main(options(folder, trunk, *more, **kind))
    return folder / "result"


def written(folder, **change):
    """The configuration with other values, in a file."""
    (folder / "c.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | change))
    return folder / "c.yaml"


def metrics_of(result):
    return json.loads((result / "metrics.json").read_text())


# Dense and pruned, on the bundled glyphs


def test_evaluation_alone(tmp_path):
    given = ["--config", str(CONFIG), "--dense", "--epochs", "1", "--accelerator", "cpu", "--precision", "32-true"]
    check_evaluation(image_classification.main, given, tmp_path)


def test_a_pruned_model(tmp_path, trunk, capsys):
    result = tuned(tmp_path, trunk)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "config.yaml", "last.pt", "log.csv", "result"}
    assert zeros(result)
    own, given = Masks.load(result / "mask.safetensors"), Masks.load(trunk["mask"])
    assert own.provenance == given.provenance and set(own) == set(given)
    assert all(torch.equal(own[name], mask) for name, mask in given.items())
    metrics = metrics_of(result)
    assert list(metrics) == ["seen", "unseen"]
    assert all(0 <= found["top1"] <= found["top5"] <= 100 for found in metrics.values())
    assert capsys.readouterr().out.endswith(f"results: {result}\n")
    card = (result / "README.md").read_text()
    assert "- task: dino_classification" in card and "- pruner: toss" in card and "## Metrics: unseen" in card
    again = dino.build(SIZES, result / "model.safetensors")  # the result is a checkpoint of the model itself
    own.check(dino.prunable_view(again))


def test_the_dense_model(tmp_path, trunk):
    result = tuned(tmp_path, trunk, "-m", str(trunk["mask"]), "--skip_eval", dense=True)  # --dense overrides --mask
    assert not (result / "mask.safetensors").exists() and metrics_of(result) == {}
    weights, before = load_file(result / "model.safetensors"), torch.load(trunk["weights"])["model"]
    assert all((weights[name] != 0).float().mean() > 0.99 for name in dino.prunable_view(dino.build(SIZES)).weights)
    assert not torch.equal(weights["classifier.weight"], before["classifier.weight"])


def test_resumed_after_each_epoch(tmp_path, trunk):
    whole = tuned(tmp_path / "whole", trunk)
    image_classification.main(options(tmp_path / "cut", trunk, "--incremental"))
    assert not (tmp_path / "cut" / "result").exists()
    cut = tuned(tmp_path / "cut", trunk, "--incremental")
    for name in ("model.safetensors", "metrics.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


# The classifier


def test_a_classifier_of_other_classes_is_new(trunk):
    before = torch.load(trunk["weights"])["model"]
    torch.manual_seed(7)
    same = dino_classification.build(SIZES, trunk["weights"]).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in before.items())
    fewer = dino.Config(**{**vars(SIZES), "classes": 10})
    model = dino_classification.build(fewer, trunk["weights"])
    assert model.classifier.weight.shape == (10, 16) and model.classifier.weight.std() > 0
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items() if "classifier" not in name)


def test_a_checkpoint_without_a_classifier_as_the_published_one(tmp_path, trunk):
    before = torch.load(trunk["weights"])["model"]
    bare = {name.removeprefix("vit."): t for name, t in before.items() if not name.startswith("classifier")}
    torch.save(bare, tmp_path / "bare.pth")
    state = dino_classification.build(SIZES, tmp_path / "bare.pth").state_dict()
    assert all(torch.equal(state[f"vit.{name}"], tensor) for name, tensor in bare.items())
    del bare["layernorm.weight"]
    torch.save(bare, tmp_path / "less.pth")
    with pytest.raises(ValueError, match="1 missing: vit.layernorm.weight"):
        dino_classification.build(SIZES, tmp_path / "less.pth")


def test_the_classifier_learns_at_its_own_rate(trunk):
    model = dino_classification.build(SIZES, trunk["weights"])
    optimizer = finetuning_optimizer(model, OptimizerConfig(lr=0.1, lr_mult=7), dino_classification.NEW, "32-true")
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.7 if name.startswith("classifier") else 0.1)


def test_label_smoothing(trunk):
    batch = {"image": torch.randn(3, 3, 24, 24), "label": torch.tensor([5, 0, 75])}
    plain, smooth = (dino_classification.build(SIZES, trunk["weights"], label_smoothing=s) for s in (0.0, 0.3))
    logits = plain.classify(batch["image"]).log_softmax(-1)
    own = -logits[torch.arange(3), batch["label"]].mean()
    torch.testing.assert_close(plain(batch)["loss"], own)
    torch.testing.assert_close(smooth(batch)["loss"], 0.7 * own - 0.3 * logits.mean())


# Two processes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path, trunk):
    one = tuned(tmp_path / "one", trunk, "--epochs", "0")  # evaluated as it is
    printed = script("image_classification.py", *options(tmp_path / "two", trunk, "--epochs", "0", "-d", "2"))
    assert metrics_of(tmp_path / "two" / "result") == metrics_of(one)
    assert only_bars(printed.stderr) and printed.stdout.count("results:") == 1


@pytest.mark.multiprocess
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, trunk):
    """There is no dropout: eight images in a step, two times four in turn or side by side."""
    tuned(tmp_path / "one", trunk, "--skip_eval")
    script("image_classification.py", *options(tmp_path / "two", trunk, "--skip_eval", "-d", "2"))
    one, two = ([float(row[2]) for row in log_rows(tmp_path / n) if row[1] == "loss"] for n in ("one", "two"))
    assert len(one) == len(two) == 8
    assert two == pytest.approx(one, rel=2e-5)  # six digits are in the log
    assert zeros(tmp_path / "two" / "result")


# Public data


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Small files in the layouts of Flowers102 and ImageNet; name -> root."""
    folder = tmp_path_factory.mktemp("public")
    for name in ("flowers102", "imagenet"):
        (folder / name / "annots").mkdir(parents=True)
    splits = ["train", "train", "val", "test", "train", "val", "test", "test"]
    rows = [f"{i}.jpg,{i % 3},{split}\n" for i, split in enumerate(splits)]
    (folder / "flowers102/annots/split.csv").write_text("filename,class,split\n" + "".join(rows))
    (folder / "flowers102/annots/metadata.csv").write_text("idx,class_name\n0,rose\n1,tulip\n2,daisy\n")
    (folder / "imagenet/annots/metadata.csv").write_text("folder_name,class_name\nn1,cat\nn2,dog\nn3,owl\nn4,emu\n")
    for i in range(8):
        picture(folder / "flowers102/images" / f"{i}.jpg", i)
        for split in ("train", "val"):
            picture(folder / "imagenet" / split / f"n{1 + i % 4}" / f"{split}_{i}.JPEG", i)
    return {name: folder / name for name in ("flowers102", "imagenet")}


def full_size(folder, root, **change):
    """The full-size configuration with only sizes reduced."""
    config = yaml.safe_load(Path("configs/dino/image_classification.yaml").read_text())
    config |= {"model_config": str(CONFIGS / "dino_model.yaml"), "data_root": str(root), "workers": 1}
    config["scheduler"]["epochs"] = 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "full.yaml").write_text(yaml.safe_dump(config | {"image_res": 40, "batch_size_train": 4} | change))
    return folder / "full.yaml"


@pytest.mark.parametrize(("dataset", "classes", "images"), [("flowers102", 3, 5), ("imagenet", 4, 8)])
def test_flowers_and_imagenet(tmp_path, trunk, public, dataset, classes, images):
    """With positions interpolated from 24 to 40 pixels; Flowers102 trains on train and val."""
    config = full_size(tmp_path, public[dataset], batch_size_target=4)
    result = tuned(tmp_path / "out", trunk, "--dataset", dataset, config=config)
    assert zeros(result) and list(metrics_of(result)) == ["test"]
    weights = load_file(result / "model.safetensors")
    assert weights["classifier.weight"].shape == (classes, 16)
    assert weights["vit.embeddings.position_embeddings"].shape == (1, 1 + 5 * 5, 16)
    steps = {int(step) for step, name, _ in log_rows(tmp_path / "out")[1:] if name == "loss"}
    assert max(steps) == 2 * -(-images // 4)
    assert not (tmp_path / "out" / "best.pt").exists(), "nothing is chosen by what is tested on"


def test_the_share_that_is_right_is_of_the_images_of_the_test(tmp_path, trunk, public):
    """Three of eight images are for testing: accuracies are thirds."""
    config = full_size(tmp_path, public["flowers102"])
    options = ["--dataset", "flowers102", "--batch_size", "2", "--debug"]
    (found,) = metrics_of(tuned(tmp_path / "out", trunk, *options, config=config)).values()
    assert any(found["top1"] == pytest.approx(100 * n / 3) for n in range(4)) and found["top5"] == 100


def test_images_that_cannot_be_read(tmp_path, trunk, public, capsys):
    rows = "filename,class,split\na.jpg,0,train\nb.jpg,1,train\nc.jpg,1,test\nd.jpg,0,train\n"
    (tmp_path / "annots").mkdir()
    (tmp_path / "annots/split.csv").write_text(rows)
    (tmp_path / "annots/metadata.csv").write_text("idx,class_name\n0,rose\n1,tulip\n")
    for i, name in enumerate("abcd"):
        picture(tmp_path / "images" / f"{name}.jpg", i)
    (tmp_path / "images/b.jpg").write_bytes(b"no image")
    config = full_size(tmp_path, tmp_path, workers=0)
    given = options(tmp_path / "out", trunk, "--dataset", "flowers102", "--batch_size", "4", config=config)
    assert "of 4 samples were skipped" in refused(capsys, image_classification.main, given)
    image_classification.main([*given, "--max_skipped", "0.5"])
    assert "b.jpg" in (tmp_path / "out/skipped.txt").read_text() and zeros(tmp_path / "out/result")


# CIFAR


def cifar_files(folder, name, images):
    """Random images in the public format, in the folder that torchvision reads: file name -> (pixels, labels)."""
    reader, rng, content = READERS[name], np.random.default_rng(0), {}
    classes = 10 if name == "cifar10" else 100
    (folder / reader.base_folder).mkdir(parents=True)
    for file, _ in (*reader.train_list, *reader.test_list):
        data = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = rng.integers(0, classes, images).tolist()
        fine = {"labels": labels} if name == "cifar10" else {"fine_labels": labels, "coarse_labels": [0] * images}
        write(folder / reader.base_folder / file, {"data": data, "filenames": ["a.png"] * images, **fine})
        content[file] = data, labels
    write(
        folder / reader.base_folder / reader.meta["filename"], {reader.meta["key"]: [f"c{i}" for i in range(classes)]}
    )
    return content


def write(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


def sum_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def publish(monkeypatch):
    """Makes files the published ones: torchvision checks their sums before it reads them."""

    def published(folder, name):
        reader = READERS[name]
        for part in ("train_list", "test_list"):
            sums = [[file, sum_of(folder / reader.base_folder / file)] for file, _ in getattr(reader, part)]
            monkeypatch.setattr(reader, part, sums)
        meta = folder / reader.base_folder / reader.meta["filename"]
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sum_of(meta)})

    return published


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_has_the_pixels_and_labels_of_its_files(tmp_path, publish, offline, name):
    def plain(image, rng):
        return to_tensor(image, ((0,) * 3, (1,) * 3))

    content = cifar_files(tmp_path, name, 3)
    publish(tmp_path, name)
    for train in (True, False):
        files = READERS[name].train_list if train else READERS[name].test_list
        pixels = np.concatenate([content[file][0] for file, _ in files]).reshape(-1, 3, 32, 32)
        labels = [label for file, _ in files for label in content[file][1]]
        data = CifarDataset(name, train, plain, seed=0, root=tmp_path)
        assert len(data) == len(labels) and data.class_names[9] == "c9"
        for i, label in enumerate(labels):
            assert data[i]["label"] == label and data[i]["label"].dtype == torch.int64
            torch.testing.assert_close(data[i]["image"], torch.from_numpy(pixels[i]) / 255)


def test_cifar_draws_by_running_number(tmp_path, publish, offline):
    cifar_files(tmp_path, "cifar100", 2)
    publish(tmp_path, "cifar100")
    data = CifarDataset("cifar100", True, lambda image, rng: torch.tensor(rng.random()), seed=3, root=tmp_path)
    assert data[0]["image"] == data[0]["image"] != data[2]["image"] and data[0]["label"] == data[2]["label"]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_training_on_cifar(tmp_path, trunk, publish, offline, dataset):
    cifar_files(tmp_path, dataset, 8)
    publish(tmp_path, dataset)
    config = full_size(tmp_path, tmp_path, batch_size_target=4)
    result = tuned(tmp_path / "out", trunk, "--dataset", dataset, "--debug", "--epochs", "1", config=config)
    classes = {"cifar10": 10, "cifar100": 100}[dataset]
    assert zeros(result) and load_file(result / "model.safetensors")["classifier.bias"].shape == (classes,)


def test_pruning_and_learning_masks_on_cifar(tmp_path, publish, offline, monkeypatch, capsys):
    cifar_files(tmp_path / "data", "cifar10", 8)
    publish(tmp_path / "data", "cifar10")
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(), tmp_path / "tiny.pt")
    given = ["--model", "test_vit", "--num-classes", "10", "--img-size", "32", "--data-path", "cifar10"]
    given += ["--batch-size", "8", "--accelerator", "cpu", "--workers", "0"]
    saved = ["--ckpt", str(tmp_path / "tiny.pt"), "--save-model", str(tmp_path / "pruned.pt")]
    oneshot_pruning_timm.main([*given, "--pruner", "wanda", "--nsamples", "16", *saved])
    learned = ["--mask-only", "--sparse-checkpoint", str(tmp_path / "pruned.pt"), "--epochs", "1"]
    maskllm_train.main([*given, *learned, "--output", str(tmp_path), "--experiment", "run"])
    for mode, path in (("sparse", "pruned.pt"), ("maskllm", "run/model_best.pth.tar")):
        capsys.readouterr()
        timm_validate.main([*given, "--sparsity-mode", mode, "--checkpoint", str(tmp_path / path)])
        assert 0 <= json.loads(capsys.readouterr().out)["top1"] <= 100


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_of_cifar_that_are_not_the_published_ones_are_not_unpickled(tmp_path, offline, trunk, capsys):
    cifar_files(tmp_path, "cifar10", 3)
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        write(path, Trap(tmp_path / "sprung"))
    given = options(tmp_path / "out", trunk, "--dataset", "cifar10", config=full_size(tmp_path, tmp_path))
    told = refused(capsys, image_classification.main, given)
    assert f"{tmp_path}/cifar-10-batches-py: not there as published" in told
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert (tmp_path / "sprung").exists(), "it would have been noticed"


def test_cifar_is_downloaded_once(tmp_path, publish, monkeypatch):
    cifar_files(tmp_path / "server", "cifar10", 2)
    publish(tmp_path / "server", "cifar10")
    reader, archive = READERS["cifar10"], tmp_path / "server" / "c.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "server" / reader.base_folder, reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", sum_of(archive))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(reader, "url", f"http://localhost:{server.server_port}/{archive.name}")
        first = CifarDataset("cifar10", False, EvalTransform(8), seed=0, root=tmp_path / "here")
        server.shutdown()
    again = CifarDataset("cifar10", True, EvalTransform(8), seed=0, root=tmp_path / "here")
    assert len(first) == 2 and len(again) == 10


def test_without_cifar_and_without_a_network(tmp_path, trunk, offline, capsys):
    config = full_size(tmp_path, tmp_path / "data")
    told = refused(capsys, image_classification.main, options(tmp_path / "out", trunk, config=config))
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert f"{url} cannot be downloaded (the network is unreachable): unpack that file in {tmp_path}/data" in told
    assert not (tmp_path / "out").exists()


# The command line


def test_the_options_of_the_published_script():
    given = ["--dataset", "cifar100", "--image_size", "48", "--batch_size", "32", "--epochs", "7", "--lr", "0.2"]
    args = image_classification.parse([*given, "--warmup_frac", "0.25", "--sched_type", "cosine", "-m", "m", "-d", "2"])
    config = load_config(CONFIG, ClassificationConfig).overridden(vars(args))
    assert (config.image_res, config.batch_size_target, config.batch_size_train) == (48, 32, 16)
    assert (config.scheduler.epochs, config.scheduler.num_warmup_steps, config.scheduler.sched) == (7, 0.25, "cosine")
    assert config.optimizer.lr == 0.2 and args.model == "dino" and args.dataset == "cifar100"
    assert config.accumulation(2) == 1
    plain = load_config(CONFIG, ClassificationConfig)
    assert plain.overridden(vars(image_classification.parse(["--dense"]))) == plain


def test_bundled_is_what_is_learned_where_nothing_else_is_there(tmp_path, without_torch):  # noqa: F811
    """The bundled model's configuration is the one that is taken without arguments."""
    config = load_config("configs/dino/image_classification_mini.yaml", ClassificationConfig)
    assert config.dataset == "bundled"
    told = early(["image_classification.py", "--output_dir", str(tmp_path)], without_torch)
    assert "give --mask FILE to train a pruned model, or --dense" in told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--dataset", "cifar"], "--dataset: invalid choice: 'cifar'"),
        (["--dataset", "imagenet"], "data/imagenet/annots/metadata.csv: file not found; docs/datasets.md says how"),
        (["--model", "xvlm"], "there is no classification with the model 'xvlm'; there is with: dino"),
        (["--batch_size", "9", "-d", "2"], "--batch_size 9 is no multiple of 2 devices"),
        (["--batch_size", "0"], "--batch_size: expected an integer of at least 1"),
        (["--epochs", "-1"], "--epochs: expected an integer of at least 0"),
        (["--lr", "0"], "--lr: expected a number above 0"),
        (["--warmup_frac", "1.5"], "--warmup_frac: expected a fraction between 0 and 1"),
        (["--sched_type", "step"], "--sched_type: invalid choice: 'step'"),
        (["--image_size", "x"], "--image_size: expected an integer of at least 1"),
        (["-pre", "absent.pth"], "absent.pth: weights file not found; give --pretraining_weights PATH"),
        (["--learning_rate", "1"], "unrecognized argument --learning_rate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_heavy_imports(tmp_path, without_torch, given, told):  # noqa: F811
    first = ["--dense", "--config", str(CONFIG), "--output_dir", str(tmp_path / "out")]
    assert told in early(["image_classification.py", *first, *given], without_torch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dataset": "mnist"}, "dataset must be one of bundled, cifar10, cifar100, flowers102, imagenet, got 'mnist'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        ({"max_tokens": 3}, "max_tokens is for models of texts"),
        ({"bundled": {"test": ["scenes"]}}, "bundled.test must be of seen, unseen, got 'scenes'"),
        ({"bundled": {"test_images": 0}}, "test_images must be at least 1, got 0"),
        ({"epochs": 3}, "unknown key 'epochs'"),
    ],
)
def test_bad_configurations(tmp_path, without_torch, change, told):  # noqa: F811
    first = ["image_classification.py", "--dense", "--output_dir", str(tmp_path / "out")]
    assert told in early([*first, "--config", str(written(tmp_path, **change))], without_torch)
    assert not (tmp_path / "out").exists()


def test_images_that_do_not_go_into_patches(tmp_path, trunk, capsys):
    given = options(tmp_path / "out", trunk, "--image_size", "30")
    assert "image_size must be a multiple of patch_size 8, got 30" in refused(capsys, image_classification.main, given)


def test_a_mask_of_another_model(tmp_path, trunk, capsys):
    Masks({name + "x": mask for name, mask in Masks.load(trunk["mask"]).items()}).save(tmp_path / "other.safetensors")
    given = options(tmp_path / "out", trunk | {"mask": tmp_path / "other.safetensors"})
    told = refused(capsys, image_classification.main, given)
    assert "the masks do not fit this model" in told
    assert "missing: vit.encoder.layer.0.attention.attention.query.weight" in told


def test_help_needs_no_heavy_import_and_names_all_defaults(without_torch):  # noqa: F811
    command = [sys.executable, "image_classification.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    for option in re.split(r"\n  (?=-)", done.stdout)[2:]:
        assert "default" in option, option
