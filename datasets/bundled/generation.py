"""Single glyphs on white as images to be generated, and samples with noise as networks that predict it are trained and
calibrated on.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from datasets.bundled.glyphs import Glyphs, image_tensor, load_glyphs, paste
from datasets.sampler import sample_generator
from sparsity.errors import MissingFileError, UserError

PLUS_MINUS_ONE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and deviation with which pixels go from -1 to 1
TIMES = 1000  # of a schedule of noise
FILLED = 0.9  # longest side of a glyph as a fraction of the image's


def check_pixels(sizes: Any, where: str) -> None:
    """Raise UserError unless a model of these sizes makes RGB images. where: the file that says so."""
    if not sizes.pixels or sizes.channels != 3:
        raise UserError(f"{where}: the bundled glyphs are images: set pixels: true and channels: 3")


class BundledGlyphs(Dataset):
    """Items {"image": (3, side, side) in [-1, 1], "label": () int64}: every concept in every font of training, concept
    after concept. The classes are the subcategories in alphabetical order, as in `BundledClassification`.
    """

    def __init__(self, glyphs: Glyphs, side: int):
        self.glyphs, self.side = glyphs, side
        self.class_names = tuple(sorted(set(glyphs.subcategories)))

    def __len__(self) -> int:
        return len(self.glyphs) * len(self.glyphs.train_vendors)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        concept, vendor = divmod(index, len(self.glyphs.train_vendors))
        stamp = self.glyphs.stamp(self.glyphs.train_vendors[vendor], concept, round(FILLED * self.side))
        image = np.full((self.side, self.side, 3), 255, np.uint8)
        height, width = stamp.shape[:2]
        paste(image, stamp, (self.side - width) // 2, (self.side - height) // 2)
        label = self.class_names.index(self.glyphs.subcategories[concept])
        return {"image": image_tensor(image, PLUS_MINUS_ONE), "label": torch.tensor(label)}


class Latents(Dataset):
    """Items {"image": (C, H, W), "label": () int64} of tensors."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor):
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.latents[index], "label": self.labels[index]}


class Noised(Dataset):
    """Samples of `data`, items {"image", "label"}, with "noise" of the image's shape and a "time" of the schedule.

    Indexed by a running number n = epoch * length + index, on which and the seed alone depends what is drawn.

    Args:
        length: of an epoch, by default that of `data`, which is read again where it is shorter: with other noise.
        null_class: label that takes the place of a share `dropout` of the others; None: of none.
    """

    def __init__(self, data: Dataset, *, null_class: int | None, dropout: float, seed: int, length: int | None = None):
        self.data, self.null_class, self.dropout, self.seed = data, null_class, dropout, seed
        self.length = length or len(data)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        index, rng = sample_generator(n, len(self), self.seed)
        item = self.data[index % len(self.data)]
        noise = torch.from_numpy(rng.standard_normal(tuple(item["image"].shape), np.float32))
        time = torch.tensor(int(rng.integers(TIMES)))
        label = item["label"]
        if self.null_class is not None and rng.random() < self.dropout:
            label = torch.tensor(self.null_class)
        return {"image": item["image"], "label": label, "noise": noise, "time": time}


def read_latents(path: str | Path, sizes: Any) -> Latents:
    """Read what sample.py writes without a VAE: a safetensors file with "latents" (N, C, H, W) and "labels" (N,).

    sizes: of the model. Raises OSError or UserError, naming the file, where it is not one, or of another model.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: there is no such file of latents; sample.py writes one")
    try:
        content = load_file(path)
        latents, labels = content["latents"].float(), content["labels"].long()
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{path}: expected a safetensors file with 'latents' and 'labels'") from error
    fits = latents.ndim == 4 and tuple(latents.shape[1:]) == sizes.shape and labels.shape == latents.shape[:1]
    if not fits or not len(latents):
        expected = f"(N, {', '.join(map(str, sizes.shape))}) and (N,)"
        raise UserError(f"{path}: expected {expected}, got {tuple(latents.shape)} and {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) <= (sizes.null_class or sizes.classes - 1):
        raise UserError(f"{path}: labels must be from 0 to {sizes.classes - 1}")
    return Latents(latents, labels)


def labels_of(text: str | None, number: int | None, sizes: Any, usual: Sequence[int] = ()) -> list[int]:
    """The classes to be drawn, `number` of them.

    text: comma separated numbers, or names of bundled classes where the model has them, in turns. Without it those
    that are usual, or `number` evenly over all classes, 64 by default. Raises UserError for a class that is none.
    """
    if text is None and not usual:
        number = number or 64
        return [i * sizes.classes // number % sizes.classes for i in range(number)]
    chosen = list(usual) if text is None else [_label(part.strip(), sizes) for part in text.split(",")]
    return [chosen[i % len(chosen)] for i in range(number or len(chosen))]


def _label(text: str, sizes: Any) -> int:
    names = sorted(set(load_glyphs().subcategories)) if sizes.pixels else []
    if text in names[: sizes.classes]:
        return names.index(text)
    if text.isdigit() and int(text) < sizes.classes:
        return int(text)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise UserError(f"--class-labels: expected numbers from 0 to {sizes.classes - 1}, got {text!r}{hint}")
