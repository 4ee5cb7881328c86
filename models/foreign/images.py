"""How the images of a classifier are prepared, by its own data configuration or image processor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.external import timm_classifier
from sparsity.errors import UserError

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers -> timm's names


@dataclass(frozen=True)
class Preparation:
    """settings: for timm.data.create_transform: input_size, mean, std, interpolation, crop_pct. evaluate: RGB image ->
    (3, H, W), as the model is evaluated.
    """

    settings: dict[str, Any]
    evaluate: Callable[[Image.Image], Tensor]

    @property
    def side(self) -> int:
        return self.settings["input_size"][-1]


@dataclass(frozen=True)
class Processed:
    """RGB image -> (3, H, W), as an image processor of transformers makes it."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def of_timm(model: nn.Module, image_size: int | None) -> Preparation:
    """Return the preparation that timm has for a model as it is built."""
    settings = timm_classifier.data_config(model, image_size)
    return Preparation(settings, timm_classifier.transform(settings))


def of_transformers(name: str, processor: Any) -> Preparation:
    """Return the preparation by an image processor of transformers.

    What its training needs is measured, not read from fields that each processor has others of: the size that images
    come out with, and what black and white become. UserError where images keep sizes of their own.
    """

    evaluate = Processed(processor)
    black, white, wide = (evaluate(_plain(*how)) for how in ((64, 64, 0), (64, 64, 255), (96, 64, 0)))
    if black.ndim != 3 or black.shape != wide.shape:
        raise UserError(f"--model hf:{name}: its processor does not make images of one size, which a classifier needs")
    low, high = (image.mean((1, 2), dtype=torch.float64) for image in (black, white))
    # normalised = (x - mean) / std for x in [0, 1]: black is -mean / std, and white - black is 1 / std
    std = 1 / (high - low)
    mean = -low * std
    resample = getattr(processor, "resample", None)
    settings = {
        "input_size": tuple(black.shape),
        "mean": tuple(mean.tolist()),
        "std": tuple(std.tolist()),
        "interpolation": "bicubic" if resample is None else INTERPOLATIONS.get(int(resample), "bicubic"),
        "crop_pct": 1.0,
    }
    return Preparation(settings, evaluate)


def _plain(width: int, height: int, grey: int) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), grey, dtype=np.uint8))
