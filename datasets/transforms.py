"""Images to normalised tensors, in a worker of a DataLoader to `Pixels`. Whatever is random is drawn from the generator
that is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import get_worker_info
from torchvision.transforms.v2 import functional as F

from sparsity.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FINETUNING_SCALE = (0.5, 1.0)  # share of an image's area that a crop keeps; (0.2, 1) in pretraining
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel
CLIP: Statistics = (CLIP_MEAN, CLIP_STD)
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = (128, 128, 128)  # what a shear, shift or rotation uncovers


@dataclass(frozen=True)
class Pixels:
    """Images on their way out of a worker, in a quarter of the bytes: what they cost there is the shared memory.

    grey: uint8 (..., 3, H, W). Moved to a device, the CPU too, they are the tensor that is normalised there.
    """

    grey: torch.Tensor
    statistics: Statistics

    def __len__(self) -> int:
        return len(self.grey)

    def pin_memory(self, *device: Any) -> Pixels:
        return Pixels(self.grey.pin_memory(*device), self.statistics)

    def to(self, device: Any, **options: Any) -> torch.Tensor:
        return normalise(self.grey.to(device, **options), self.statistics)


def to_tensor(image: Image.Image, statistics: Statistics = CLIP) -> torch.Tensor | Pixels:
    """RGB image to a normalised float tensor (3, H, W); see `finish`."""
    return finish(torch.from_numpy(np.stack(image.split())), statistics)


def finish(pixels: torch.Tensor, statistics: Statistics) -> torch.Tensor | Pixels:
    """uint8 (3, H, W) normalised, in a worker of a DataLoader only said how."""
    return normalise(pixels, statistics) if get_worker_info() is None else Pixels(pixels, statistics)


def normalise(pixels: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """uint8 (..., 3, H, W) to float32, from [0, 1] to the statistics; torchvision's normalize to the bit, without
    copies.
    """
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in statistics)
    return pixels.float().mul_(1 / 255).sub_(mean).div_(std)


def resize(image: Image.Image, image_res: int) -> torch.Tensor:
    """RGB image to uint8 (3, image_res, image_res), bicubic; the aspect ratio is not kept.

    Pillow's resize but for its rounding (a grey level or two), in less than half of its time.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # channels last in memory: the fast path
    return interpolate(pixels[None], (image_res, image_res), mode="bicubic", antialias=True)[0]


class EvalTransform:
    """Plain resize: RGB image -> (3, image_res, image_res). A generator may be handed in and is not used."""

    def __init__(self, image_res: int, statistics: Statistics = CLIP):
        self.image_res, self.statistics = _positive(image_res), statistics

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> torch.Tensor | Pixels:
        return finish(resize(image, self.image_res), self.statistics)


class TrainTransform:
    """Random resized crop, flip, RandAugment: RGB image -> (3, image_res, image_res).

    Args:
        image_res: side of the result in pixels.
        scale: least and largest share of the image's area that is kept: (0.2, 1) in pretraining, (0.5, 1) after it.
        flip: mirror half of the images; off where the caller flips, knowing what the text says.
        augment: default `RandAugment(2, 7)`.
        statistics: that the result is normalised with.
    """

    def __init__(
        self,
        image_res: int,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        augment: RandAugment | None = None,
        statistics: Statistics = CLIP,
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"scale must be two rising fractions between 0 and 1, got {scale!r}")
        self.image_res, self.scale, self.flip = _positive(image_res), scale, flip
        self.augment = RandAugment() if augment is None else augment
        self.statistics = statistics

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor | Pixels:
        pixels = resize(image.crop(random_crop(image.size, self.scale, rng)), self.image_res)
        if self.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        small = Image.merge("RGB", [Image.fromarray(band) for band in pixels.numpy()])
        return to_tensor(self.augment(small, rng), self.statistics)


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) with a share of the area in `scale` and an aspect ratio of 3/4 to 4/3."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # an image too long or too high for it: its largest central part of a legal ratio
        w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


class RandAugment:
    """`num_ops` operations drawn with replacement, each done with probability `prob` (after arXiv 1909.13719).

    The operations and their strengths at `level` (0 to 10) are those of ALBEF, BLIP and XVLM.
    """

    def __init__(self, num_ops: int = 2, level: float = 7, prob: float = 0.5):
        if not 0 <= level <= 10:
            raise UserError(f"the level of RandAugment must be between 0 and 10, got {level!r}")
        self.num_ops, self.level, self.prob = num_ops, level, prob

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augment an RGB image; its size stays."""
        names = list(OPERATIONS)
        for i in rng.integers(len(names), size=self.num_ops):
            apply, sign = rng.random() < self.prob, 1 if rng.random() < 0.5 else -1
            if apply:
                image = OPERATIONS[names[i]](image, self.level / 10, sign)
        return image


def _shift(image: Image.Image, x: int, y: int) -> Image.Image:
    """Moved by whole pixels, to the right and down."""
    moved = Image.new("RGB", image.size, _GREY)
    moved.paste(image, (x, y))
    return moved


def _shear_x(image: Image.Image, slope: float) -> Image.Image:
    """Row y moved by slope * (y - middle) pixels, between the two nearest pixels linearly.

    Two integer shears and a blend of the rows: a third of the time of an affine map with bilinear interpolation.
    """
    rows = slope * (np.arange(image.height) + 0.5 - image.height / 2)
    weights = np.rint((rows - np.floor(rows)) * 255).astype(np.uint8)
    start = -slope * image.height / 2
    left, right = (
        image.transform(image.size, Image.Transform.AFFINE, (1, slope, start + side, 0, 1, 0), fillcolor=_GREY)
        for side in (-0.5, 0.5)  # from the middle of a pixel to the middles of the two that it lies between
    )
    mask = Image.fromarray(np.repeat(weights[:, None], image.width, axis=1))
    return Image.composite(right, left, mask)


def _shear_y(image: Image.Image, slope: float) -> Image.Image:
    sheared = _shear_x(image.transpose(Image.Transpose.TRANSPOSE), slope)
    return sheared.transpose(Image.Transpose.TRANSPOSE)


# (image, strength 0..1, sign) -> image. A shift is at most 10 pixels of 224.
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "Identity": lambda image, strength, sign: image,
    "AutoContrast": lambda image, strength, sign: F.autocontrast(image),
    "Equalize": lambda image, strength, sign: F.equalize(image),
    "Brightness": lambda image, strength, sign: F.adjust_brightness(image, 0.1 + 1.8 * strength),
    "Sharpness": lambda image, strength, sign: F.adjust_sharpness(image, 0.1 + 1.8 * strength),
    "ShearX": lambda image, strength, sign: _shear_x(image, 0.3 * strength * sign),
    "ShearY": lambda image, strength, sign: _shear_y(image, 0.3 * strength * sign),
    "TranslateX": lambda image, strength, sign: _shift(image, round(image.width * 10 / 224 * strength) * sign, 0),
    "TranslateY": lambda image, strength, sign: _shift(image, 0, round(image.height * 10 / 224 * strength) * sign),
    "Rotate": lambda image, strength, sign: image.rotate(
        -30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=_GREY
    ),
}


class RegionTransform:
    """Crop that contains a chosen box, flip, resize; the boxes go along (XVLM, arXiv 2111.08276).

    Args:
        image_res: side of the result in pixels.
        min_inside: a box is kept if more than this share of its area is inside the crop.
    """

    def __init__(self, image_res: int, min_inside: float = 0.5):
        if not 0 <= min_inside < 1:
            raise UserError(f"min_inside must be a fraction from 0 to below 1, got {min_inside!r}")
        self.image_res, self.min_inside = _positive(image_res), min_inside

    def __call__(
        self, image: Image.Image, boxes: np.ndarray, rng: np.random.Generator, flip: bool
    ) -> tuple[torch.Tensor | Pixels, np.ndarray, np.ndarray]:
        """Transform an RGB image and its boxes.

        Args:
            boxes: (N, 4), x, y, width, height in pixels, inside the image.
            flip: whether the image may be mirrored (half of the images are).

        Returns:
            The image (3, image_res, image_res), the boxes (N, 4) as cx, cy, w, h in [0, 1] of what is left of them, and
            which of them are kept (N,).
        """
        left, top, right, bottom = crop = self._crop(image.size, boxes, rng)
        low = np.maximum(boxes[:, :2], (left, top))
        high = np.minimum(boxes[:, :2] + boxes[:, 2:], (right, bottom))
        sides = np.maximum(high - low, 0)
        kept = sides.prod(axis=1) > self.min_inside * boxes[:, 2:].prod(axis=1)
        size = np.array((right - left, bottom - top))
        centres = ((low + high) / 2 - (left, top)) / size
        pixels = resize(image.crop(crop), self.image_res)
        if flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
            centres[:, 0] = 1 - centres[:, 0]
        return finish(pixels, CLIP), np.concatenate((centres, sides / size), axis=1), kept

    def _crop(self, size: tuple[int, int], boxes: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        if len(boxes) == 0:
            return 0, 0, *size
        x, y, w, h = boxes[rng.integers(len(boxes))]
        left, top = (int(rng.integers(math.floor(v) + 1)) for v in (x, y))
        right, bottom = (int(rng.integers(math.ceil(v), side + 1)) for v, side in ((x + w, size[0]), (y + h, size[1])))
        return left, top, right, bottom


def box_attention(boxes: np.ndarray, grid: int) -> torch.Tensor:
    """Which of the 1 + grid * grid tokens belong to each box: the class token and the patches that the box touches.

    boxes is (N, 4), cx, cy, w, h in [0, 1]; returns int64 (N, 1 + grid * grid), patches row by row.
    """
    edge = 1e-6  # in patches: a box that ends where a patch begins does not touch it
    low = np.floor((boxes[:, :2] - boxes[:, 2:] / 2) * grid + edge).clip(0, grid - 1)
    high = np.ceil((boxes[:, :2] + boxes[:, 2:] / 2) * grid - edge).clip(low + 1, grid)
    places = np.arange(grid)
    columns = (places >= low[:, :1]) & (places < high[:, :1])  # (N, grid)
    rows = (places >= low[:, 1:]) & (places < high[:, 1:])
    patches = (rows[:, :, None] & columns[:, None, :]).reshape(len(boxes), grid * grid)
    return torch.from_numpy(np.insert(patches, 0, True, axis=1).astype(np.int64))


def _positive(image_res: int) -> int:
    if image_res < 1:
        raise UserError(f"image_res must be at least 1 pixel, got {image_res!r}")
    return image_res
