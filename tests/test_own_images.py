"""image_classification.py on images without labels, and with the teacher of another run, end to end."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import image_classification
from tests.test_finetuning import log_rows, zeros
from tests.test_own_folder import (
    CLASSES,
    NEW,
    dense,  # noqa: F401
    folder,  # noqa: F401
    metrics_of,
    options,
    picture,
    toss,
    tuned,
    vit,  # noqa: F401
)
from tests.test_scripts import refused

# ruff: noqa: F811 (fixtures have the names of arguments)
pytestmark = pytest.mark.script

BUNDLED = Path("data/vit_mini.safetensors")
FREE = ["--distill", "1", "--val_fraction", "0.25"]


@pytest.fixture(scope="module")
def loose(folder, tmp_path_factory):
    """The images of the folder, all in one, without their classes: 18."""
    root = tmp_path_factory.mktemp("loose")
    for path in sorted((folder / "train").rglob("*.png")):
        (root / f"{path.parent.name}_{path.name}").symlink_to(path)
    return root


@pytest.mark.parametrize("library", ["timm", "hf", "dino"])
def test_a_pruned_model_learns_from_images_alone(library, dense, vit, loose, tmp_path):
    """It keeps its head, comes nearer to the dense model, and is measured by what that one says."""
    model = {"timm": f"timm:local-dir:{dense}", "hf": f"hf:{vit}", "dino": "dino"}[library]
    file = {"timm": dense / "model.safetensors", "hf": vit / "model.safetensors"}.get(library, BUNDLED)
    before = load_file(file)
    if library == "hf":  # which names weights in files otherwise than their modules
        named = transformers.ViTForImageClassification.from_pretrained(vit).named_parameters()
    else:
        named = before.items()
    inside = [(name, t.shape) for name, t in named if t.ndim == 2 and ("blocks." in name or ".layer" in name)]
    mask = toss(dict(inside), tmp_path / "mask.safetensors")
    result = tuned(loose, tmp_path / "out", *FREE, model=model, mask=mask, epochs=6)
    assert library == "hf" or zeros(result)
    assert load_file(result / "model.safetensors").keys() == before.keys()
    assert metrics_of(result).keys() == {"test"} and 0 <= metrics_of(result)["test"]["agree"] <= 100
    losses = [float(value) for _, name, value in log_rows(tmp_path / "out")[1:] if name == "loss"]
    assert losses[-1] < losses[0]
    assert {name for _, name, _ in log_rows(tmp_path / "out")[1:]}.isdisjoint({"task"})
    assert (result / "classes.json").is_file() == (library != "dino"), "of the bundled head no names are known"
    still = tuned(loose, tmp_path / "still", *FREE, model=model, epochs=0)  # dense, as it is: the teacher itself
    assert metrics_of(still)["test"] == {"agree": 100.0}
    after = load_file(still / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_images_without_labels_are_tested_on_images_that_have_some(dense, folder, loose, tmp_path):
    """train/ without class folders, val/ with: the accuracy of the classes of val/, whose head is kept."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train").symlink_to(loose)
    (tmp_path / "own/val").symlink_to(folder / "val")
    out = tmp_path / "out"
    result = tuned(tmp_path / "own", out, "--distill", "1", model=f"timm:local-dir:{dense}", epochs=0)
    assert metrics_of(result)["test"] == metrics_of(dense)["test"]


def test_images_without_labels_and_the_teacher_of_another_run(dense, loose, tmp_path):
    """Random weights have a new head: it is that of the teacher, whose classes it takes."""
    teacher = str(dense / "model.safetensors")
    random = {"model": "timm:vit_tiny_patch16_224", "epochs": 1}
    result = tuned(loose, tmp_path / "out", *NEW, *FREE, "--teacher", teacher, **random)
    assert (result / "classes.json").read_bytes() == (dense / "classes.json").read_bytes()


def test_images_without_labels_need_a_teacher(dense, vit, folder, loose, tmp_path, capsys):
    def told(where, *more, model=f"timm:local-dir:{dense}"):
        return refused(capsys, image_classification.main, options(where, tmp_path / "o", *more, model=model))

    without = "images without class folders have no labels: give --distill 1, which learns from the dense model alone"
    assert f"{loose}: {without}; else expected a folder for each class" in told(loose)
    assert without in told(loose, "--distill", "0.5")
    assert "give --teacher FILE" in told(loose, *NEW, *FREE, model="timm:vit_tiny_patch16_224")
    assert "mixup and cutmix mix labels, and these images have none" in told(loose, *FREE, "--mixup", "0.5")
    assert "--keep_head is for class folders" in told(loose, *FREE, "--keep_head")
    (tmp_path / "one").mkdir()
    picture(tmp_path / "one/1.png", 0, 0)
    assert "one image alone" in told(tmp_path / "one", *FREE)


# Teachers


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_the_result_of_a_run_teaches_the_next(library, dense, vit, folder, tmp_path, capsys):
    """Nothing is learned of a teacher that is what the run starts from; of one with other classes nothing is either."""
    if library == "timm":
        model, teacher = f"timm:local-dir:{dense}", dense
    else:
        model = f"hf:{vit}"
        teacher = tuned(folder, tmp_path / "first", model=model, epochs=0)
    more = ["--distill", "1", "--teacher", str(teacher / "model.safetensors"), "--skip_eval"]
    more += ["--optimizer", "sgd", "--weight_decay", "0"]
    tuned(folder, tmp_path / "out", *more, model=model, epochs=1)
    losses = [float(value) for _, name, value in log_rows(tmp_path / "out")[1:] if name == "distill"]
    assert losses == pytest.approx([0.0], abs=1e-6)
    for name in ("train", "val"):
        for number, label in enumerate(("x", *CLASSES[1:])):
            (tmp_path / "other" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "other" / name / label).symlink_to(folder / name / CLASSES[number])
    given = options(tmp_path / "other", tmp_path / "o", *more, model=model)
    assert "its classes are 'a 2', 'a 10', 'Bee', and those of the data are" in refused(
        capsys, image_classification.main, given
    )
