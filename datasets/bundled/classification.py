"""Single glyphs of the bundled artwork as labelled images: the label is the concept's CLDR subcategory.

Training shows the fonts of three vendors, turned, stretched, recoloured and blurred anew in every epoch; the fourth
vendor's font is the test set.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset

from datasets.bundled.glyphs import Glyphs, draw_background, image_tensor, jitter, paste
from datasets.sampler import sample_generator
from datasets.transforms import IMAGENET
from sparsity.errors import UserError

SPLITS = ("train", "seen", "unseen")
SIZES = (0.55, 0.7, 0.9)  # longest side of a glyph as a fraction of the image's, in the two test splits
BACKGROUNDS = ("plain", "gradient", "blotches")  # in the two test splits
VARIATIONS = len(SIZES) * len(BACKGROUNDS)  # test images of a concept
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of RGB


class BundledClassification(Dataset):
    """Items {"image": (3, side, side), "label": () int64, "fine_label": () int64}; the classes are the subcategories in
    alphabetical order, the fine label is the concept.

    Args:
        split: "train" (fonts of training, augmented, new images every epoch), "seen" (the same fonts) or "unseen" (the
            font that training never shows); the latter two are the same plain images in every epoch: every concept
            first, then again at another size or on another background.
        length: images in an epoch; item n is image n % length of epoch n // length. In a test split at most
            `VARIATIONS` of each concept, which is the default.
        strength: of the augmentation in training, 0 to 1.

    Raises:
        UserError: an unknown split, or a length that cannot be.
    """

    def __init__(
        self,
        glyphs: Glyphs,
        split: str,
        length: int | None = None,
        *,
        side: int,
        seed: int = 0,
        strength: float = 1.0,
    ):
        most = len(glyphs) * VARIATIONS
        length = most if length is None else length
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if length < 1 or (split != "train" and length > most):
            limit = "" if split == "train" else f" and at most {most}"
            raise UserError(f"the number of bundled images must be at least 1{limit}, got {length!r}")
        self.glyphs, self.split, self.length, self.side, self.seed = glyphs, split, length, side, seed
        self.strength = strength
        self.class_names = tuple(sorted(set(glyphs.subcategories)))
        self.labels = np.array([self.class_names.index(name) for name in glyphs.subcategories], dtype=np.int64)
        self.vendors = (glyphs.unseen_vendor,) if split == "unseen" else glyphs.train_vendors

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        image, concept = self.draw(n)
        labels = {"label": torch.tensor(self.labels[concept]), "fine_label": torch.tensor(concept)}
        return {"image": image_tensor(image, IMAGENET), **labels}

    def draw(self, n: int) -> tuple[np.ndarray, int]:
        """Image (side, side, 3) uint8 of running number n, and its concept."""
        train = self.split == "train"
        index, rng = sample_generator(n if train else n % self.length, self.length, self.seed)
        variation, concept = divmod(index, len(self.glyphs))
        vendor = self.vendors[rng.integers(len(self.vendors))]
        if train:
            return draw_augmented(self.glyphs, rng, vendor, concept, self.side, self.strength), concept
        ground, size = divmod(variation, len(SIZES))
        stamp = self.glyphs.stamp(vendor, concept, round(SIZES[size] * self.side))
        image = draw_background(self.glyphs, rng, self.side, False, BACKGROUNDS[ground])
        height, width = stamp.shape[:2]
        paste(image, stamp, int(rng.integers(self.side - width + 1)), int(rng.integers(self.side - height + 1)))
        return image, concept


def draw_augmented(
    glyphs: Glyphs, rng: np.random.Generator, vendor: str, concept: int, side: int, strength: float
) -> np.ndarray:
    """A glyph (side, side, 3) uint8 on a background, with all that a drawing of another hand may differ in."""
    image = draw_background(glyphs, rng, side, True)
    stamp = warped(glyphs.images[vendor][concept], rng, side, strength)
    paste(image, recoloured(stamp, rng, strength), 0, 0)
    image = jitter(image, rng)
    if rng.random() < 0.3 * strength:
        image = np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2))))
    if rng.random() < 0.3 * strength:
        _cover(image, rng)
    return image


def warped(glyph: np.ndarray, rng: np.random.Generator, side: int, strength: float) -> np.ndarray:
    """A glyph (s, s, 4) turned, stretched, sheared, mirrored, resized and moved: (side, side, 4) uint8, its colour
    multiplied by alpha, and 255 - alpha.
    """
    angle = rng.normal(0, 0.2 * strength)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    stretch = math.exp(strength * rng.uniform(-0.2, 0.2))
    shear = np.array([[stretch, strength * rng.uniform(-0.15, 0.15)], [0, 1 / stretch]])
    scale = rng.uniform(0.5, 1.0) * side / len(glyph)
    forward = scale * turn @ shear @ np.diag([1 if rng.random() < 0.5 else -1, 1])
    room = side / 2 * max(0.1 * strength, 1 - scale * len(glyph) / side)  # a large glyph may be cut off a little
    centre = side / 2 + rng.uniform(-room, room, 2)
    inverse = np.linalg.inv(forward)
    shift = len(glyph) / 2 - inverse @ centre
    matrix = (*inverse[0], shift[0], *inverse[1], shift[1])
    drawn = Image.fromarray(glyph).convert("RGBa")
    drawn = np.array(drawn.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    drawn[..., 3] = 255 - drawn[..., 3]
    return drawn


def recoloured(stamp: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """A stamp (h, w, 4) in other colours: hue turned, saturation and brightness changed, now and then grey."""
    if rng.random() > 0.8 * strength:
        return stamp
    hue = rng.normal(0, 0.3) if rng.random() < 0.8 else rng.uniform(-math.pi, math.pi)
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.5, 1.5)
    axis = 1 / math.sqrt(3)  # of the grey diagonal
    cross = np.array([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]])  # product with it
    turned = math.cos(hue) * np.eye(3) + math.sin(hue) * cross + (1 - math.cos(hue)) / 3
    mix = rng.uniform(0.75, 1.25) * (saturation * turned + (1 - saturation) * _GREY)
    colour = stamp[..., :3].reshape(-1, 3).astype(np.float32) @ mix.astype(np.float32).T
    visible = 255 - stamp[..., 3:]
    colour = np.clip(colour.reshape(*stamp.shape[:2], 3), 0, visible).astype(np.uint8)
    return np.concatenate([colour, stamp[..., 3:]], -1)


def _cover(image: np.ndarray, rng: np.random.Generator) -> None:
    """Paint over a rectangle of up to 0.35 of the side, in place."""
    side = len(image)
    height, width = (rng.uniform(0.1, 0.35, 2) * side).astype(int)
    y, x = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
    image[y : y + height, x : x + width] = rng.integers(256, size=3)
