"""The artwork of the bundled set: glyphs of several vendors, turned and resized, on drawn backgrounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configs.locations import located
from datasets.transforms import CLIP, Statistics
from sparsity.errors import MissingFileError


class Glyphs:
    """The artwork: `images[vendor]` is (concepts, size, size, 4) uint8 with straight alpha, concept i is `names[i]`.

    Glyphs that were turned and resized for a scene are kept, the latest `cache_bytes` of them in each process.
    """

    def __init__(
        self,
        images: dict[str, np.ndarray],
        concepts: Sequence[dict[str, Any]],
        train_vendors: Sequence[str],
        unseen_vendor: str,
        cache_bytes: int = 192 << 20,
    ):
        self.images, self.concepts = images, tuple(concepts)
        self.names = tuple(concept["name"] for concept in concepts)
        self.categories = tuple(concept["category"] for concept in concepts)
        self.subcategories = tuple(concept["subcategory"] for concept in concepts)
        self.train_vendors, self.unseen_vendor = tuple(train_vendors), unseen_vendor
        self._cache: dict[tuple[str, int, int, int], np.ndarray] = {}
        self._room = cache_bytes
        self._grain = np.random.default_rng(0).standard_normal((256, 256, 1), np.float32)  # the same in every process

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, vendor: str, concept: int, size: int, angle: int = 0) -> np.ndarray:
        """A glyph turned by `angle` degrees and cut to what is drawn, its longer side `size` pixels.

        Returns (h, w, 4) uint8: the colour multiplied by alpha, and 255 - alpha.
        """
        key = (vendor, concept, size, angle)
        stamp = self._cache.get(key)
        if stamp is None:
            stamp = _make_stamp(self.images[vendor][concept], size, angle)
            self._room -= stamp.nbytes
            self._cache[key] = stamp
            while self._room < 0:
                self._room += self._cache.pop(next(iter(self._cache))).nbytes
        return stamp

    def grain(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """Normal noise (side, side, 1), a random window of a fixed texture that repeats."""
        y, x = rng.integers(256, size=2)
        window = np.arange(side)
        return self._grain[(y + window[:, None]) % 256, (x + window) % 256]


def _make_stamp(image: np.ndarray, size: int, angle: int) -> np.ndarray:
    glyph = Image.fromarray(image).convert("RGBa")  # multiplied by alpha: filters don't pull in hidden colour
    if angle:
        glyph = glyph.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    scale = size / max(glyph.size)
    shape = [max(1, round(length * scale)) for length in glyph.size]
    pixels = np.asarray(glyph.resize(shape, Image.Resampling.BICUBIC))
    alpha = pixels[..., 3:]
    return np.concatenate([np.minimum(pixels[..., :3], alpha), 255 - alpha], -1)  # bicubic overshoots


def load_glyphs(root: str | Path = "data/bundled") -> Glyphs:
    """Read the pack. Raises FileNotFoundError where a file of it is missing."""
    root = located(Path(root))
    pack = json.loads(_part(root / "concepts.json").read_text(encoding="utf-8"))
    size, columns, n = pack["size"], pack["columns"], len(pack["concepts"])
    images = {}
    for vendor in pack["vendors"]:
        with Image.open(_part(root / f"{vendor['key']}.webp"), formats=("WEBP",)) as atlas:
            cells = np.asarray(atlas.convert("RGBA")).reshape(-1, size, columns, size, 4)
        images[vendor["key"]] = cells.swapaxes(1, 2).reshape(-1, size, size, 4)[:n]
    trained = [vendor["key"] for vendor in pack["vendors"] if vendor["trained"]]
    (unseen,) = (vendor["key"] for vendor in pack["vendors"] if not vendor["trained"])
    return Glyphs(images, pack["concepts"], trained, unseen)


def _part(path: Path) -> Path:
    if not path.is_file():
        raise MissingFileError(f"{path}: not found; it comes with the repository, or run scripts/rebuild_bundled.sh")
    return path


def draw_background(
    glyphs: Glyphs, rng: np.random.Generator, side: int, augment: bool, kind: str | None = None
) -> np.ndarray:
    """A canvas (side, side, 3) uint8 in soft colours; training also sees dark ones."""
    colour = 255 - 105 * rng.random(3, np.float32)
    if augment and rng.random() < 0.2:
        colour = 255 - colour
    if kind is None:
        kind = ("plain", "gradient", "blotches", "grain")[rng.integers(4 if augment else 2)]
    if kind == "plain":
        return np.full((side, side, 3), colour.round(), np.uint8)
    if kind == "blotches":
        coarse = np.clip(colour + rng.uniform(-40, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
        return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    if kind == "grain":
        canvas = colour + np.float32(rng.uniform(3, 15)) * glyphs.grain(rng, side)
    else:
        ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
        down, across = rng.uniform(-1, 1, 2).astype(np.float32)
        slope = down * ramp[:, None] + across * ramp
        canvas = colour + slope[..., None] * rng.uniform(-60, 60, 3).astype(np.float32)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def paste(canvas: np.ndarray, stamp: np.ndarray, x: int, y: int) -> None:
    """Lay a stamp over the canvas, in place."""
    h, w = stamp.shape[:2]
    under = canvas[y : y + h, x : x + w]
    seen = under * stamp[..., 3:].astype(np.uint16) + 128
    under[...] = stamp[..., :3] + ((seen + (seen >> 8)) >> 8)  # division by 255, rounded


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and tint of the whole image."""
    gain = (rng.uniform(0.85, 1.15) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)
    shift = (128 - 128 * gain + rng.uniform(-18, 18)).astype(np.float32)
    # Over rows of side * 3 numbers: broadcasting over three is slow.
    bright = image.reshape(len(image), -1) * np.tile(gain, image.shape[1]) + np.tile(shift, image.shape[1])
    return np.clip(bright, 0, 255, out=bright).astype(np.uint8).reshape(image.shape)


def image_tensor(image: np.ndarray, statistics: Statistics = CLIP) -> torch.Tensor:
    """(H, W, 3) uint8 to a float tensor (3, H, W), normalised with a mean and standard deviation."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in statistics)
    return torch.from_numpy(image.transpose(2, 0, 1) * (1 / (255 * std)) - mean / std)
