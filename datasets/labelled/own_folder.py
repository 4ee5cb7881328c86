"""Images of one's own: a folder with train/ and val/ (and test/) of class folders, or one of these. What learns from a
dense model alone needs no class folders.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configs.decoding import Decoding
from datasets.annotations import ImageRoot
from datasets.images import DEFAULT
from datasets.labelled.class_folders import EXTENSIONS, class_folders, image_files, images_below, in_order, is_loose
from datasets.labelled.data_path import VALIDATION
from datasets.labelled.public import ClassificationDataset
from datasets.labelled.unlabelled import UnlabelledImages
from datasets.splits import split
from sparsity.errors import UserError, listed

log = logging.getLogger(__name__)

HELD_OUT = 0.2  # of each class, unless told otherwise
SPLIT_SEED = 0  # of the images that are held out: the same ones in all runs, whatever their seeds
EXPECTED = f"expected a folder for each class, with {', '.join(EXTENSIONS)}"
UNLABELLED = "images without class folders have no labels: give --distill 1, which learns from the dense model alone"
Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]


@dataclass(frozen=True)
class OwnFolder:
    """class_names: in natural order, as labels count them; none where there are no labels. parts: "train", "val" and
    perhaps "test" -> the folder and its images, (path in it, label), or their paths alone.
    """

    class_names: tuple[str, ...]
    parts: Mapping[str, tuple[Path, Sequence[tuple[str, int]] | Sequence[str]]]

    def dataset(
        self, part: str, transform: Transform, *, seed: int = 0, decoding: Decoding = DEFAULT
    ) -> ClassificationDataset | UnlabelledImages:
        """Return the images of a part, as datasets.labelled.public has them, or without labels."""
        folder, samples = self.parts[part]
        reading = {"seed": seed, "decoding": decoding}
        if isinstance(samples[0], str):
            return UnlabelledImages(folder, samples, transform, **reading)
        return ClassificationDataset(folder, samples, self.class_names, transform, **reading)


@lru_cache(maxsize=1)  # a folder of a million images is listed once in a run
def own_folder(path: str, val_fraction: float | None = None, unlabelled: bool = False) -> OwnFolder:
    """Return the images of a folder by part and class.

    val_fraction: share of each class that is held out, by default `HELD_OUT`, where there is no val/. unlabelled: what
    is trained on need not lie in class folders. Raises MissingFileError where there is no folder, UserError where it is
    not as expected.
    """
    root = Path(path)
    ImageRoot(root)
    train = root / "train" if (root / "train").is_dir() else root
    val = next((root / name for name in VALIDATION if train != root and (root / name).is_dir()), None)
    test = root / "test" if train != root and (root / "test").is_dir() else None
    if val is not None and val_fraction is not None:
        raise UserError(f"--val_fraction splits what has no val/, and there is {val}: leave it out")
    share = HELD_OUT if val_fraction is None else val_fraction
    loose = is_loose(train)
    if loose and unlabelled:
        return _unlabelled(train, {"val": val, "test": test}, share)
    if loose and not class_folders(train):
        raise UserError(f"{train}: {UNLABELLED}; else {EXPECTED}")
    found = _images(train)
    names = in_order(found)
    if len(names) < 2:
        raise UserError(f"{train}: {len(names)} class folders, and there is nothing to tell apart; {EXPECTED}")
    if val is None:
        found, held = _split(found, share, train)
        count = sum(map(len, held.values()))
        log.info("%s: %d images (%g of each class) are held out, the same ones in all runs", train, count, share)
        parts = {"train": (train, found), "val": (train, held)}
    else:
        parts = {"train": (train, found), "val": (val, _images(val, names))}
    if test is not None:
        parts["test"] = (test, _images(test, names))
    labels = {name: label for label, name in enumerate(names)}
    return OwnFolder(tuple(names), {part: (at, _samples(images, labels)) for part, (at, images) in parts.items()})


def _unlabelled(train: Path, evaluated: Mapping[str, Path | None], share: float) -> OwnFolder:
    """Return images of training without labels. Those that are evaluated have some where they lie in class folders.

    share: of the images, which is held out where there is no "val" in `evaluated`.
    """
    paths = images_below(train)
    parts: dict[str, tuple[Path, Any]] = {"train": (train, paths)}
    if evaluated["val"] is None:
        if len(paths) < 2:
            raise UserError(f"{train}: one image alone cannot be both trained and tested on: add others")
        left, held = split(paths, share, str(train))
        log.info("%s: %d of %d images are held out, the same ones in all runs", train, len(held), len(paths))
        parts = {"train": (train, left), "val": (train, held)}
    there = {part: folder for part, folder in evaluated.items() if folder is not None}
    classed = {part: _images(folder) for part, folder in there.items() if not is_loose(folder)}
    names = in_order({name for images in classed.values() for name in images})
    labels = {name: label for label, name in enumerate(names)}
    for part, folder in there.items():
        images = _samples(classed[part], labels) if part in classed else images_below(folder)
        parts[part] = (folder, images)
    return OwnFolder(tuple(names), parts)


def _images(folder: Path, known: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Return class -> names of its images; UserError for classes without any, and for others than the known ones."""
    names = class_folders(folder)
    unknown = [name for name in names if known is not None and name not in known]
    if unknown:
        raise UserError(
            f"{folder}: there are no images to train on of {listed(unknown)}: remove them, or add to train/"
        )
    found = {name: image_files(folder / name) for name in names}
    empty = [name for name, images in found.items() if not images]
    if empty or not names:
        told = f"no image in {listed(empty)}" if empty else "no class folder in it"
        raise UserError(f"{folder}: {told}; {EXPECTED}")
    return found


def _split(
    found: Mapping[str, Sequence[str]], share: float, folder: Path
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return what is left of each class, and what is held out: its share, rounded, at least one image and not all."""
    left, held = {}, {}
    for name, images in found.items():
        if len(images) < 2:
            raise UserError(f"{folder / name}: one image alone cannot be both trained and tested on: add others")
        count = min(max(1, round(share * len(images))), len(images) - 1)
        # Of the class alone: what is held out of one does not depend on which others there are.
        order = np.random.default_rng([SPLIT_SEED, zlib.crc32(name.encode())]).permutation(len(images))
        chosen = set(order[:count].tolist())
        held[name] = [image for i, image in enumerate(images) if i in chosen]
        left[name] = [image for i, image in enumerate(images) if i not in chosen]
    return left, held


def _samples(images: Mapping[str, Sequence[str]], labels: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(f"{name}/{image}", labels[name]) for name, found in images.items() for image in found]
