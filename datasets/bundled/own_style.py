"""A user's data set, made up: the bundled artwork drawn in ink on paper, as scripts/own_data.sh trains on it.

No bundled task has images of this style: outlines and hatching in one colour on another, where those are painted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.bundled.glyphs import Glyphs, load_glyphs
from datasets.bundled.scenes import Scene, draw_scene
from sparsity.files import write_atomic

CLASSES = ("banana", "bicycle", "butterfly", "cactus", "fish", "guitar", "hammer", "key", "penguin", "scissors")
SIDE, CAPTIONED_SIDE = 72, 96  # pixels of an image with a class, and with a caption, as the bundled models read them
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of RGB
_HATCHING = ((115, 1), (165, -1))  # tone from which on lines are drawn, and their slope
_DISTANCE = 4  # pixels from line to line


def write_own_data(folder: str | Path, *, train: int, val: int, captioned: int, seed: int = 0) -> Path:
    """Write `images/{train,val}/<class>/*.png` and `captions.json` with `scenes/*.png`; returns the folder.

    train, val: images of each of the `CLASSES`. captioned: images with a caption, of one or two objects. The same
    numbers give the same bytes.
    """
    folder, glyphs = Path(folder), load_glyphs()
    vendors = (*glyphs.train_vendors, glyphs.unseen_vendor)
    for part, (name, count) in enumerate({"train": train, "val": val}.items()):
        for concept in map(glyphs.names.index, CLASSES):
            for i in range(count):
                rng = np.random.default_rng((seed, part, concept, i))
                scene = draw_scene(glyphs, rng, vendors, SIDE, concepts=[concept], background="plain")
                _save(inked(scene.image, rng), folder / "images" / name / glyphs.names[concept] / f"{i:04d}.png")
    records = [_captioned(folder, glyphs, vendors, seed, i) for i in range(captioned)]
    if records:
        write_atomic(folder / "captions.json", (json.dumps(records, indent=1) + "\n").encode())
    return folder


def inked(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an image (H, W, 3) uint8 as a drawing: outlines, hatching where it is dark."""
    grey = image @ _GREY  # (H, W)
    down, across = np.gradient(grey)
    ink = np.clip(np.hypot(down, across) / 45 - 0.25, 0, 1)
    y, x = np.indices(grey.shape)
    for tone, slope in _HATCHING:
        lines = (x + slope * y + int(rng.integers(_DISTANCE))) % _DISTANCE == 0
        ink = np.maximum(ink, 0.7 * (lines & (255 - grey > tone)))
    paper, pen = rng.uniform(190, 255, 3), rng.uniform(0, 110, 3)
    drawn = paper + ink[..., None] * (pen - paper)  # (H, W, 3)
    drawn += rng.normal(0, 8, grey.shape)[..., None]  # grain of the paper
    return np.clip(drawn, 0, 255).astype(np.uint8)


def _captioned(folder: Path, glyphs: Glyphs, vendors: Sequence[str], seed: int, number: int) -> dict[str, str]:
    rng = np.random.default_rng((seed, 2, number))
    scene: Scene = draw_scene(glyphs, rng, vendors, CAPTIONED_SIDE, int(rng.integers(1, 3)), background="plain")
    path = f"scenes/{number:05d}.png"
    _save(inked(scene.image, rng), folder / path)
    return {"image": path, "caption": scene.caption}


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
