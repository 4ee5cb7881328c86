"""Class folders: counted as timm counts them, without what a Mac or a notebook leaves beside them."""

import random
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from datasets.labelled.class_folders import class_folders, image_files, images_below, in_order
from datasets.labelled.data_path import labelled_folder
from datasets.labelled.image_folder import ImageFolder
from datasets.labelled.public import imagenet


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def names_of(kind, rng):
    """Twelve names of class folders."""
    if kind == "numbers":
        return [str(i) for i in rng.sample(range(300), 12)]
    if kind == "zeros":
        return [f"{i:03}" for i in rng.sample(range(300), 12)]
    if kind == "synsets":
        return [f"n{rng.randrange(10**8):08}" for _ in range(12)]
    letters = string.ascii_letters + string.digits + "_ -"
    names = {"".join(rng.choices(letters, k=rng.randint(1, 6))).strip() for _ in range(40)} - {""}
    by_case = {name.lower(): name for name in names}  # what timm's own order leaves open
    return list(by_case.values())[:12]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["numbers", "zeros", "synsets", "anything"])
def test_classes_are_counted_as_timm_counts_them(tmp_path, kind, seed):
    for name in names_of(kind, random.Random(seed)):
        write(tmp_path / "train" / name / "a.png")
    _, timm = find_images_and_targets(str(tmp_path / "train"))
    data = labelled_folder(tmp_path, True, lambda image, rng: torch.zeros(1), seed=0)
    assert {name: label for label, name in enumerate(data.class_names)} == timm
    assert class_folders(tmp_path / "train") == list(ImageFolder(tmp_path / "train", seed=0).classes) == list(timm)
    paths = [data.records[i] for i in range(len(data))]
    assert all(timm[Path(path).parent.name] == label for path, label in paths)


def test_eleven_numbered_classes():
    assert in_order(map(str, range(12))) == [str(i) for i in range(12)]
    assert in_order(["b10", "B2", "a", "b2"]) == ["a", "B2", "b2", "b10"], "an order even where timm's has none"


def litter(folder):
    """Write the files that a Mac, a notebook, an archive and a file server leave in a folder of classes."""
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trashes"):
        write(folder / name / "0.png")
    for inside in [path for path in folder.iterdir() if path.name in ("a", "b")]:
        (inside / "._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        (inside / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        write(inside / ".ipynb_checkpoints" / "0-checkpoint.png")


def test_hidden_files_and_folders_change_nothing(tmp_path):
    for part in ("train", "val"):
        for name in "ab":
            write(tmp_path / part / name / "0.png")
    (tmp_path / "annots").mkdir()
    (tmp_path / "annots" / "metadata.csv").write_text("folder_name,class_name\na,A\nb,B\n")

    def seen():
        plain = [labelled_folder(tmp_path, train, lambda image, rng: image, seed=0) for train in (True, False)]
        plain.append(imagenet("train", lambda image, rng: image, seed=0, root=tmp_path))
        plain.append(labelled_folder(tmp_path / "val", False, lambda image, rng: image, seed=0))
        listed = [([data.records[i] for i in range(len(data))], data.class_names) for data in plain]
        folder = ImageFolder(tmp_path / "train", seed=0)
        return [*listed, (folder.paths, folder.classes), images_below(tmp_path / "val"), image_files(tmp_path / "val")]

    clean = seen()
    assert clean[0][1] == ("a", "b") and clean[-2] == ["a/0.png", "b/0.png"] and clean[-1] == []
    for part in ("train", "val"):
        litter(tmp_path / part)
    assert seen() == clean
