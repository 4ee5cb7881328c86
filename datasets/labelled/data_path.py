"""Labelled images by one word, as `--data-path` has it: a folder, CIFAR, or the bundled glyphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.decoding import Decoding
from configs.locations import located
from datasets.annotations import ImageRoot
from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import load_glyphs
from datasets.images import DEFAULT
from datasets.labelled.cifar import READERS, CifarDataset
from datasets.labelled.class_folders import EXTENSIONS, class_folders, image_files, in_order
from datasets.labelled.public import ClassificationDataset
from sparsity.errors import MissingFileError, UserError

BUNDLED = "bundled"
FORMS = f"a folder with train/ and val/, {', '.join(READERS)} or {BUNDLED}"
DOWNLOADED = "data"  # where CIFAR lies
VALIDATION = ("val", "validation")  # names of that folder


class Plain:
    """A transform that draws nothing, as datasets call it."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        return self.transform(image)


def open_data(
    path: str,
    train: bool,
    transform: Callable[[Image.Image], torch.Tensor],
    *,
    side: int,
    seed: int = 0,
    length: int | None = None,
    decoding: Decoding = DEFAULT,
) -> Dataset:
    """Images to calibrate on, or those that accuracy is reported on, never the same; `class_names` are theirs.

    transform: RGB image -> tensor. The bundled glyphs (`side` pixels, normalised by ImageNet's statistics) have theirs;
    of theirs to calibrate on there are as many as wanted, `length`. seed: of all that is drawn. decoding: how image
    files become pictures. Raises OSError and UserError where there is no such data.
    """
    if path == BUNDLED:
        split, length = ("train", length) if train else ("unseen", None)
        return BundledClassification(load_glyphs(), split, length, side=side, seed=seed)
    if path in READERS:
        return CifarDataset(path, train, Plain(transform), seed=seed, root=located(DOWNLOADED))
    return labelled_folder(Path(path), train, Plain(transform), seed=seed, decoding=decoding)


def check_data(path: str) -> None:
    """FileNotFoundError where this is neither a folder nor a word."""
    if path not in (BUNDLED, *READERS) and not Path(path).is_dir():
        raise MissingFileError(f"--data-path {path}: expected {FORMS}")


def has_validation(path: str) -> bool:
    """Whether there are images to report accuracy on."""
    return path in (BUNDLED, *READERS) or _part(Path(path), train=False) is not None


def labelled_folder(
    root: Path, train: bool, transform: Callable[..., Any], *, seed: int, decoding: Decoding = DEFAULT
) -> ClassificationDataset:
    """`{root}/train/<class>/*.JPEG` or `{root}/val/<class>/*.JPEG`; for validation `{root}/<class>/*.JPEG`, too.

    Labels count the classes of both parts together in natural order (2 before 10), as timm does when it trains.
    Raises FileNotFoundError where the part is missing, UserError where there is no image in it.
    """
    ImageRoot(root)
    folder = _part(root, train)
    if folder is None:
        missing = root / ("train" if train else "val")
        raise MissingFileError(f"{missing}: folder not found; expected one with a folder of images for each class")
    parts = [part for part in (_part(root, True), _part(root, False)) if part is not None and part != root]
    names = in_order({name for part in parts or [folder] for name in class_folders(part)})
    labels = {name: label for label, name in enumerate(names)}
    samples = [
        (f"{name}/{image}", labels[name]) for name in class_folders(folder) for image in image_files(folder / name)
    ]
    if not samples:
        raise UserError(f"{folder}: no image found; expected <class>/ with {', '.join(EXTENSIONS)}")
    return ClassificationDataset(folder, samples, names, transform, seed=seed, decoding=decoding)


def _part(root: Path, train: bool) -> Path | None:
    """The folder of a part; for validation it may be the whole, where it has no parts."""
    found = [root / name for name in (("train",) if train else VALIDATION) if (root / name).is_dir()]
    if found or train or (root / "train").is_dir():
        return found[0] if found else None
    return root if root.is_dir() and class_folders(root) else None
