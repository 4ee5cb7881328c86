"""The bundled image-text set: scenes drawn from emoji artwork, with captions and boxes, made while they are read.

Three of the four fonts in `data/bundled` are for training; the fourth is drawn by tests of generalisation only. A
sample is a function of (seed, epoch, index), whatever was read before it. Left and right stand in the captions, so a
scene must not be mirrored once it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.bundled.captions import SceneObject, coarse_position, plain_caption, region_caption, varied_caption
from datasets.bundled.glyphs import Glyphs, draw_background, image_tensor, jitter, paste
from datasets.transforms import box_attention
from sparsity.errors import UserError

MAX_OBJECTS = 4
# Longest side of a glyph as a fraction of the scene's. Few values, so that resized glyphs can be kept.
_SIZES = {1: (0.55, 0.7, 0.9), 2: (0.3, 0.38, 0.46, 0.55), 3: (0.3, 0.38, 0.46), 4: (0.3, 0.38)}
_ANGLES = (0, 0, -10, 10)  # degrees
_OVERLAP = 0.08  # of the smaller of two boxes
Encode = Callable[[str, np.random.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Scene:
    """image: (side, side, 3) uint8; the caption names every object once; one region caption per object."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    caption: str
    region_captions: tuple[str, ...]


def draw_scene(
    glyphs: Glyphs,
    rng: np.random.Generator,
    vendors: Sequence[str],
    side: int = 96,
    n_objects: int = 1,
    augment: bool = True,
    concepts: Sequence[int] | None = None,
    background: str | None = None,
) -> Scene:
    """Draw a scene of `n_objects` different concepts and write its captions.

    Args:
        rng: the only source of randomness.
        vendors: fonts to draw from, one drawn for each object.
        side: height and width in pixels.
        augment: turned glyphs, colour jitter, rough and dark backgrounds, and captions of changing form.
        concepts: which concepts, `n_objects` of them; drawn where None.
        background: "plain", "gradient", "blotches" or "grain"; drawn where None.
    """
    if not 1 <= n_objects <= MAX_OBJECTS:
        raise UserError(f"n_objects must be between 1 and {MAX_OBJECTS}, got {n_objects!r}")
    if side < 16:
        raise UserError(f"side must be at least 16 pixels, got {side!r}")
    if concepts is None:
        concepts = rng.choice(len(glyphs), n_objects, replace=False).tolist()
    if len(concepts) != n_objects or len(set(concepts)) != n_objects:
        raise UserError(f"concepts must be {n_objects} different ones, got {concepts!r}")
    chosen = [vendors[i] for i in rng.integers(len(vendors), size=n_objects)]
    angles = [_ANGLES[i] if augment else 0 for i in rng.integers(len(_ANGLES), size=n_objects)]
    stamps, corners = _layout(glyphs, rng, side, list(zip(chosen, concepts, angles, strict=True)))
    image = draw_background(glyphs, rng, side, augment, background)
    for stamp, (x, y) in zip(stamps, corners, strict=True):
        paste(image, stamp, x, y)
    if augment:
        image = jitter(image, rng)
    objects = []
    for vendor, concept, stamp, (x, y) in zip(chosen, concepts, stamps, corners, strict=True):
        box = (x, y, stamp.shape[1], stamp.shape[0])
        objects.append(SceneObject(int(concept), glyphs.names[concept], vendor, box, coarse_position(box, side)))
    caption = varied_caption(objects, rng) if augment else plain_caption(objects)
    regions = tuple(region_caption(item, rng) if augment else item.name for item in objects)
    return Scene(image, tuple(objects), caption, regions)


def _layout(
    glyphs: Glyphs, rng: np.random.Generator, side: int, drawn: Sequence[tuple[str, int, int]]
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Sizes and places (x, y of the top left corner) for glyphs (vendor, concept, angle) that hardly overlap."""
    sizes = _SIZES[len(drawn)]
    for _ in range(3):
        picks = rng.integers(len(sizes), size=len(drawn))
        stamps = [
            glyphs.stamp(vendor, concept, round(sizes[pick] * side), angle)
            for (vendor, concept, angle), pick in zip(drawn, picks, strict=True)
        ]
        corners = _scatter(rng, side, stamps)
        if corners:
            return stamps, corners
    # The smallest size always fits, one glyph to a quadrant.
    stamps = [glyphs.stamp(vendor, concept, round(sizes[0] * side), angle) for vendor, concept, angle in drawn]
    half, corners = side // 2, []
    for stamp, quadrant in zip(stamps, rng.permutation(4).tolist(), strict=False):
        x, y = (int(rng.integers(half - length + 1)) for length in (stamp.shape[1], stamp.shape[0]))
        corners.append((x + half * (quadrant % 2), y + half * (quadrant // 2)))
    return stamps, corners


def _scatter(rng: np.random.Generator, side: int, stamps: Sequence[np.ndarray]) -> list[tuple[int, int]] | None:
    """Random corners whose boxes overlap by at most _OVERLAP of the smaller one; None where luck ran out."""
    boxes: list[tuple[int, int, int, int]] = []
    for stamp in stamps:
        h, w = stamp.shape[:2]
        for u, v in rng.random((20, 2)).tolist():
            x, y = int(u * (side - w + 1)), int(v * (side - h + 1))
            if all(_shared(x, y, w, h, *other) <= _OVERLAP for other in boxes):
                boxes.append((x, y, w, h))
                break
        else:
            return None
    return [(x, y) for x, y, _, _ in boxes]


def _shared(x: int, y: int, w: int, h: int, x2: int, y2: int, w2: int, h2: int) -> float:
    """The common area of two boxes as a fraction of the smaller one."""
    across = min(x + w, x2 + w2) - max(x, x2)
    down = min(y + h, y2 + h2) - max(y, y2)
    return across * down / min(w * h, w2 * h2) if across > 0 and down > 0 else 0.0


# Names of independent streams of random numbers; a new one goes to the end.
_STREAMS = ("train", "test", "scenes", "unseen_scenes", "unseen_glyphs", "export")


def _generator(seed: int, stream: str, epoch: int, index: int) -> np.random.Generator:
    return np.random.default_rng((seed, _STREAMS.index(stream), epoch, index))


class BundledScenes(Dataset):
    """Image-text items {"image": (3, side, side), **encode(caption, rng), "sample_ids": ()} of freshly drawn scenes.

    Args:
        encode: caption and generator to the text fields, e.g. a `datasets.text.TextEncoder`.
        length: scenes in an epoch; item n is scene n % length of epoch n // length.
        max_objects: scenes have 1 to this many objects; 1 is single large glyphs, the first step of a curriculum.
        split: "train" draws new scenes every epoch; "test" has the same plain ones in every epoch, in the fonts of
            training.
    """

    def __init__(
        self,
        glyphs: Glyphs,
        encode: Encode,
        length: int,
        *,
        side: int = 96,
        max_objects: int = MAX_OBJECTS,
        seed: int = 0,
        split: str = "train",
    ):
        if split not in ("train", "test"):
            raise UserError(f"split must be 'train' or 'test', got {split!r}")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise UserError(f"max_objects must be between 1 and {MAX_OBJECTS}, got {max_objects!r}")
        if length < 1:
            raise UserError(f"length must be at least 1, got {length!r}")
        self.glyphs, self.encode, self.length, self.side = glyphs, encode, length, side
        self.max_objects, self.seed, self.split = max_objects, seed, split

    def __len__(self) -> int:
        return self.length

    def scene(self, n: int) -> tuple[Scene, np.random.Generator]:
        """Scene of running number n, and the generator that drew it for what comes after."""
        if n < 0:
            raise IndexError(f"a running number must not be negative, got {n!r}")
        epoch, index = divmod(n, self.length)
        rng = _generator(self.seed, self.split, epoch if self.split == "train" else 0, index)
        n_objects = int(rng.integers(1, self.max_objects + 1))
        train = self.split == "train"
        return draw_scene(self.glyphs, rng, self.glyphs.train_vendors, self.side, n_objects, augment=train), rng

    def __getitem__(self, n: int) -> dict[str, Any]:
        scene, rng = self.scene(n)
        fields = self.encode(scene.caption, rng)
        return {"image": image_tensor(scene.image), **fields, "sample_ids": self.sample_id(scene.objects)}

    def sample_id(self, objects: Sequence[SceneObject]) -> torch.Tensor:
        """One number for a set of concepts: samples of equal number are no negatives of each other."""
        base = len(self.glyphs) + 1
        return torch.tensor(sum((c + 1) * base**i for i, c in enumerate(sorted(item.concept for item in objects))))


class BundledRegions(BundledScenes):
    """The scenes of `BundledScenes` with their regions: the whole image with the scene's caption, then every object.

    Items {"image", "regions": [{**text fields, "image_atts" (1 + patches,), "target_bbox" (4,) = cx, cy, w, h in
    [0, 1], "is_image" 0 or 1, "sample_ids" ()}]}.

    Args:
        patch: side of a patch of the vision model, in pixels; divides `side`.
        options: of `BundledScenes`.
    """

    def __init__(self, glyphs: Glyphs, encode: Encode, length: int, *, patch: int, **options: Any):
        super().__init__(glyphs, encode, length, **options)
        if self.side % patch:
            raise UserError(f"side must be a multiple of patch = {patch}, got {self.side!r}")
        self.patch = patch

    def __getitem__(self, n: int) -> dict[str, Any]:
        scene, rng = self.scene(n)
        captions = (scene.caption, *scene.region_captions)
        own = [(*item.centre, *item.box[2:]) for item in scene.objects]
        boxes = np.array([(self.side / 2, self.side / 2, self.side, self.side), *own]) / self.side
        attention, boxes = box_attention(boxes, self.side // self.patch), boxes.astype(np.float32)
        named = (scene.objects, *((item,) for item in scene.objects))  # by each caption
        regions = [
            {
                **self.encode(caption, rng),
                "image_atts": attention[i],
                "target_bbox": torch.from_numpy(boxes[i]),
                "is_image": torch.tensor(int(i == 0)),
                "sample_ids": self.sample_id(named[i]),
            }
            for i, caption in enumerate(captions)
        ]
        return {"image": image_tensor(scene.image), "regions": regions}


class BundledRetrieval(Dataset):
    """Fixed images with one caption each, no two alike: items {"image": (3, side, side), "caption": str}.

    Args:
        split: "scenes" (fonts of training), "unseen_scenes" (the font that training never shows), "unseen_glyphs" (one
            concept of that font on a plain background; the caption is its name).
        n: images; "unseen_glyphs" has no more than there are concepts.
    """

    def __init__(
        self,
        glyphs: Glyphs,
        split: str = "scenes",
        n: int = 1000,
        *,
        side: int = 96,
        max_objects: int = MAX_OBJECTS,
        seed: int = 0,
    ):
        if split not in ("scenes", "unseen_scenes", "unseen_glyphs"):
            raise UserError(f"split must be 'scenes', 'unseen_scenes' or 'unseen_glyphs', got {split!r}")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise UserError(f"max_objects must be between 1 and {MAX_OBJECTS}, got {max_objects!r}")
        singles = split == "unseen_glyphs" or max_objects == 1
        if n < 1 or (split != "unseen_glyphs" and singles and n > len(glyphs)):
            raise UserError(f"n must be between 1 and the number of different captions, got {n!r}")
        self.glyphs, self.split, self.side, self.seed = glyphs, split, side, seed
        self._concepts = _distinct_sets(len(glyphs), min(n, len(glyphs)) if singles else n, max_objects, seed, split)

    def __len__(self) -> int:
        return len(self._concepts)

    def scene(self, i: int) -> Scene:
        """Scene i; raises IndexError beyond the last, as a sequence does."""
        concepts = self._concepts[i]
        rng = _generator(self.seed, self.split, 1, i % len(self))
        vendors = self.glyphs.train_vendors if self.split == "scenes" else (self.glyphs.unseen_vendor,)
        background = "plain" if self.split == "unseen_glyphs" else None
        return draw_scene(self.glyphs, rng, vendors, self.side, len(concepts), False, concepts, background)

    def __getitem__(self, i: int) -> dict[str, Any]:
        scene = self.scene(i)
        return {"image": image_tensor(scene.image), "caption": scene.caption}


def _distinct_sets(concepts: int, n: int, max_objects: int, seed: int, stream: str) -> list[list[int]]:
    """`n` different sets of 1 to `max_objects` concepts, in random order; sets of one concept only where asked for."""
    rng = _generator(seed, stream, 0, 0)
    if stream == "unseen_glyphs" or max_objects == 1:
        return [[c] for c in rng.permutation(concepts)[:n].tolist()]
    found: dict[frozenset[int], list[int]] = {}
    while len(found) < n:
        drawn = rng.choice(concepts, rng.integers(1, max_objects + 1), replace=False).tolist()
        found.setdefault(frozenset(drawn), drawn)
    return list(found.values())
