"""A folder of class folders: which images are held out, how classes are counted, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from datasets.labelled.own_folder import own_folder
from sparsity.errors import UserError


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    own_folder.cache_clear()


def make(root, counts):
    """counts: class -> its images."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")
    return str(root)


def test_a_share_of_each_class_is_held_out(tmp_path):
    """Rounded, at least one image and not all; nothing is lost or in both parts."""
    counts = {"a10": 20, "a2": 7, "B": 2}
    found = own_folder(make(tmp_path, counts), 0.25)
    assert found.class_names == ("a2", "a10", "B")
    train, held = (found.parts[part][1] for part in ("train", "val"))
    assert not set(train) & set(held)
    everything = {(f"{n}/{i}.png", found.class_names.index(n)) for n, count in counts.items() for i in range(count)}
    assert set(train) | set(held) == everything
    assert [sum(label == k for _, label in held) for k in range(3)] == [2, 5, 1]


def test_what_is_held_out_of_a_class_depends_on_it_alone(tmp_path):
    """Not on the other classes, nor on the run: what a model was tested on never trains its successor."""
    few = own_folder(make(tmp_path / "few", {"x": 30, "y": 30})).parts["val"][1]
    own_folder.cache_clear()
    many = own_folder(make(tmp_path / "many", {"w": 9, "x": 30, "y": 30})).parts["val"][1]
    assert [path for path, _ in many if not path.startswith("w")] == [path for path, _ in few]
    x, y = ({path.partition("/")[2] for path, _ in few if path.startswith(name)} for name in "xy")
    assert x != y, "each class has a draw of its own"


def test_folders_with_parts(tmp_path):
    make(tmp_path / "train", {"x": 3, "y": 4})
    make(tmp_path / "val", {"y": 2})
    make(tmp_path / "test", {"x": 1})
    found = own_folder(str(tmp_path))
    assert {part: len(samples) for part, (_, samples) in found.parts.items()} == {"train": 7, "val": 2, "test": 1}
    assert found.parts["val"][1] == [("y/0.png", 1), ("y/1.png", 1)], "labels are those of training"
    data = found.dataset("val", lambda image, rng: np.asarray(image).mean())
    assert data.class_names == ("x", "y") and int(data[0]["label"]) == 1


@pytest.mark.parametrize(
    ("parts", "fraction", "told"),
    [
        ({"": {"x": 3}}, None, "1 class folders, and there is nothing to tell apart"),
        ({"": {"x": 3, "y": 0}}, None, "no image in y; expected a folder for each class"),
        ({"": {"x": 3, "y": 1}}, None, "y: one image alone cannot be both trained and tested on"),
        ({"train": {"x": 3, "y": 3}, "val": {"x": 1, "z": 1}}, None, "there are no images to train on of z"),
        ({"train": {"x": 3, "y": 3}, "val": {"x": 1}}, 0.5, "--val_fraction splits what has no val/"),
        ({"": {}}, None, "no class folder in it"),
    ],
)
def test_folders_that_are_not_as_expected(tmp_path, parts, fraction, told):
    for part, counts in parts.items():
        make(tmp_path / "own" / part, counts)
    (tmp_path / "own").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=told):
        own_folder(str(tmp_path / "own"), fraction)
