"""prune.py, compare.py and pretrain.py on a two-layer vision transformer."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import compare
import pretrain
import prune
import pruners
from configs.loading import load_config
from engine.evaluation.classification import Accuracy
from engine.launch import run
from models.dino import model as dino
from sparsity.allocation.budget import budget
from sparsity.masks import Masks
from tests.processes import PATIENCE, error_line
from tests.test_scripts import same_but_for_sums

pytestmark = pytest.mark.script

CONFIGS = Path("tests/data/configs")
SMALL = ["-m", "dino", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a small run."""
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


def pruned(folder, pruner, *options, config=CONFIGS / "dino_prune.yaml"):
    """Prune in this process; the folder with the results."""
    options = [*SMALL, "--num_batches", "3", "--config", str(config), "--output_dir", str(folder), *options]
    prune.main(["-p", pruner, *options])
    return folder / pruner


@pytest.fixture(scope="module")
def view():
    with torch.device("meta"):
        return dino.prunable_view(dino.ViTForImageClassification(load_config(CONFIGS / "dino_model.yaml", dino.Config)))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A configuration that calibrates and evaluates on eight images in ImageNet's layout, with 76 classes."""
    folder = tmp_path_factory.mktemp("imagenet")
    synsets = [f"n{i:02}" for i in range(76)]
    (folder / "annots").mkdir()
    (folder / "annots" / "metadata.csv").write_text("folder_name,class_name\n" + "".join(f"{s},{s}\n" for s in synsets))
    for i in range(8):
        for split in ("train", "val"):
            path = folder / split / synsets[i % 3] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (30 * i, 100, 255 - 30 * i)).save(path)
    read = yaml.safe_load((CONFIGS / "dino_prune.yaml").read_text()) | {"bundled": False}
    images = {"dataset": "imagenet", "root": str(folder)}
    read |= {"images": images | {"split": "train"}, "evaluation": {"images": images | {"split": "val"}}}
    (folder / "prune.yaml").write_text(yaml.safe_dump(read))
    return folder / "prune.yaml"


@pytest.mark.parametrize("pruner", pruners.available())
def test_every_pruner(tmp_path, view, pruner):
    folder = pruned(tmp_path, pruner, "-s", "50", "--evaluate")
    masks = Masks.load(folder / f"dino_{pruner}_50_seed42_pruning_masks.safetensors")
    masks.check(view)
    assert masks.total - masks.kept == budget("0.5", view.numel)
    report = (folder / "report.md").read_text()
    assert "top-1" in report and "top-5" in report


@pytest.mark.parametrize("pruner", ["omp", "multiflow", "snip"])
def test_a_pattern(tmp_path, view, pruner):
    folder = pruned(tmp_path, pruner, "--pattern", "2:4")
    masks = Masks.load(folder / f"dino_{pruner}_2of4_seed42_pruning_masks.safetensors")
    assert all((masks[name].unflatten(1, (-1, 4)).sum(-1) == 2).all() for name in view.weights)


def test_calibration_and_evaluation_on_imagenet(tmp_path, imagenet, view):
    first, again = (pruned(tmp_path / str(i), "snip", "-s", "50", "--evaluate", config=imagenet) for i in range(2))
    name = "dino_snip_50_seed42_pruning_masks.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()
    bundled = pruned(tmp_path / "bundled", "snip", "-s", "50")
    assert (first / name).read_bytes() != (bundled / name).read_bytes()
    Masks.load(first / name).check(view)


def test_comparison(tmp_path, capsys):
    options = [*SMALL, "--config", str(CONFIGS / "dino_prune.yaml"), "--output_dir", str(tmp_path)]
    options += ["-p", "omp,multiflow", "-s", "50,75", "--seeds", "1,2", "--num_batches", "2"]
    compare.main(options)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 2 + 4 and {row["model"] for row in rows} == {"dino"}
    assert all(0 <= float(row["top-1"]) <= float(row["top-5"]) <= 100 for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert "top-1" in table and "R@1" not in table
    compare.main(options)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == len(rows) + 1, "nothing is done twice"


def refused(capsys, main, options):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(options))
    assert stopped.value.code == 2
    return error_line(capsys.readouterr().err)


def test_what_a_user_may_do_wrong(tmp_path, capsys):
    file, sizes = tmp_path / "c.yaml", tmp_path / "sizes.yaml"
    usual = [*SMALL, "-p", "snip", "--output_dir", str(tmp_path), "--config", str(file)]
    config = yaml.safe_load((CONFIGS / "dino_prune.yaml").read_text())
    for change, told in (
        ({"bundled": False}, "no calibration data"),
        ({"general": []}, "unknown key 'general'"),
        ({"weights": "nowhere.pth"}, "weights file not found"),
        ({"model_config": "tests/data/configs/model.yaml"}, "unknown key 'vision'"),
    ):
        file.write_text(yaml.safe_dump(config | change))
        assert told in refused(capsys, prune.main, usual)
    sizes.write_text(yaml.safe_dump(yaml.safe_load((CONFIGS / "dino_model.yaml").read_text()) | {"classes": 75}))
    file.write_text(yaml.safe_dump(config | {"model_config": str(sizes)}))
    assert "the data has 76 classes and the model 75" in refused(capsys, prune.main, [*usual, "--evaluate"])
    file.write_text(yaml.safe_dump(config))
    options = [*SMALL, "--k_test", "8", "--output_dir", str(tmp_path), "--config", str(file)]
    assert "--k_test re-ranks the candidates of retrieval" in refused(capsys, compare.main, options)


def pretrain_options(folder, config=CONFIGS / "dino_pretrain.yaml"):
    return [*SMALL, "--config", str(config), "--output_dir", str(folder)]


def script(*command):
    """A script in a process of its own, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def table(folder):
    """The rows of the report without the seconds."""
    text = (folder / "report.md").read_text()
    return [line.split("|")[:-2] for line in text.split("\n") if line.startswith(("| dense", "| 50"))]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_masks_and_the_accuracy_of_one(tmp_path):
    options = ["-s", "50", "--evaluate"]
    one = pruned(tmp_path / "one", "snip", *options)
    files = ["--num_batches", "3", "--config", str(CONFIGS / "dino_prune.yaml"), "--output_dir", str(tmp_path / "two")]
    script("prune.py", "-p", "snip", *SMALL, *files, *options, "--devices", "2")
    name = "dino_snip_50_seed42_pruning_masks.safetensors"
    same_but_for_sums(tmp_path / "two" / "snip" / name, one / name)
    assert table(tmp_path / "two" / "snip")[0] == table(one)[0] and len(table(one)) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pretrain.main(pretrain_options(folder))
    return folder


def test_training_from_scratch(trained):
    weights = load_file(trained / "dino.safetensors")
    model = dino.build(load_config(CONFIGS / "dino_model.yaml", dino.Config), trained / "dino.safetensors")
    assert {name: t.shape for name, t in weights.items()} == {n: t.shape for n, t in model.state_dict().items()}
    log = (trained / "log.csv").read_text()
    assert all(f",{name}," in log for name in ("coarse", "fine", "accuracy", "validation/top1", "validation/top5"))


def test_a_stopped_training_goes_on(trained, tmp_path, monkeypatch):
    measure = Accuracy.__call__
    measured = []

    def stop(self):
        measured.append(1)
        if len(measured) == 2:  # after step 10, which is saved, and not yet validated
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(Accuracy, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(pretrain_options(tmp_path))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 10
    pretrain.main(pretrain_options(tmp_path))
    assert (tmp_path / "dino.safetensors").read_bytes() == (trained / "dino.safetensors").read_bytes()


def test_classes_that_the_bundled_glyphs_do_not_have(tmp_path, capsys):
    sizes = yaml.safe_load((CONFIGS / "dino_model.yaml").read_text())
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes | {"classes": 75}))
    read = yaml.safe_load((CONFIGS / "dino_pretrain.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(read | {"model_config": str(tmp_path / "sizes.yaml")}))
    assert "the data has 76 classes" in refused(capsys, pretrain.main, pretrain_options(tmp_path, tmp_path / "c.yaml"))
