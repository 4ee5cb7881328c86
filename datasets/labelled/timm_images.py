"""Labelled images as timm augments them, with randomness that is a function of seed, epoch and image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset

from configs.decoding import Decoding
from configs.foreign import Augmentation
from configs.locations import located
from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import load_glyphs
from datasets.images import DEFAULT
from datasets.labelled.cifar import READERS, CifarDataset
from datasets.labelled.data_path import BUNDLED, DOWNLOADED, labelled_folder


@contextmanager
def drawing(rng: np.random.Generator) -> Iterator[None]:
    """The global random numbers of python, numpy and torch come from `rng` inside, and go on as before afterwards."""
    seed = int(rng.integers(2**32))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class TimmTransform:
    """(RGB image, generator) -> what a transform of timm makes of it."""

    transform: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        with drawing(rng):
            return self.transform(image)


def augmented(settings: dict[str, Any], how: Augmentation) -> TimmTransform:
    """Return how images of training are changed and prepared. settings: of `create_transform`."""
    options = {"auto_augment": how.aa, "re_prob": how.reprob, "re_mode": how.remode, "hflip": how.hflip}
    options |= {"color_jitter": how.color_jitter, "scale": how.scale, "ratio": how.ratio}
    return TimmTransform(create_transform(**settings | options, is_training=True))


def open_images(
    path: str,
    split: str,
    side: int,
    *,
    length: int | None = None,
    seed: int,
    augment: dict[str, Any],
    decoding: Decoding = DEFAULT,
) -> Dataset:
    """Images of a split, indexed by running numbers, with `class_names`.

    path: as datasets.labelled.data_path has it. split: "train", "val", or "test", the font that training never shows,
    of the bundled glyphs alone. side: in pixels. length: images of an epoch, of the bundled glyphs. augment: arguments
    of timm.data.create_transform; the bundled glyphs are drawn anew instead. decoding: how image files become pictures.
    Raises as `datasets.labelled.data_path.open_data`.
    """
    if path == BUNDLED:
        part = {"train": "train", "val": "seen", "test": "unseen"}[split]
        return BundledClassification(load_glyphs(), part, length, side=side, seed=seed)
    train = split == "train"
    transform = TimmTransform(create_transform(**augment, is_training=train))
    if path in READERS:
        return CifarDataset(path, train, transform, seed=seed, root=located(DOWNLOADED))
    return labelled_folder(Path(path), train, transform, seed=seed, decoding=decoding)
