"""The bundled image-text set: scenes drawn from emoji artwork, with captions and boxes, made while they are read.

Three of the four fonts in `data/bundled` are for training; the fourth is drawn by tests of generalisation only. A
sample is a function of (seed, epoch, index), whatever was read before it. Left and right stand in the captions, so a
scene must not be mirrored once it is drawn.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.transforms import CLIP, Statistics, box_attention

MAX_OBJECTS = 4
MAX_CAPTION_WORDS = 24

# Longest side of a glyph as a fraction of the scene's. Few values, so that resized glyphs can be kept.
_SIZES = {1: (0.55, 0.7, 0.9), 2: (0.3, 0.38, 0.46, 0.55), 3: (0.3, 0.38, 0.46), 4: (0.3, 0.38)}
_ANGLES = (0, 0, -10, 10)  # degrees
_OVERLAP = 0.08  # of the smaller of two boxes

Encode = Callable[[str, np.random.Generator], dict[str, torch.Tensor]]


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
    root = Path(root)
    pack = json.loads(_part(root / "concepts.json").read_text(encoding="utf-8"))
    size, columns, n = pack["size"], pack["columns"], len(pack["concepts"])
    images = {}
    for vendor in pack["vendors"]:
        with Image.open(_part(root / f"{vendor['key']}.webp")) as atlas:
            cells = np.asarray(atlas.convert("RGBA")).reshape(-1, size, columns, size, 4)
        images[vendor["key"]] = cells.swapaxes(1, 2).reshape(-1, size, size, 4)[:n]
    trained = [vendor["key"] for vendor in pack["vendors"] if vendor["trained"]]
    (unseen,) = (vendor["key"] for vendor in pack["vendors"] if not vendor["trained"])
    return Glyphs(images, pack["concepts"], trained, unseen)


def _part(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; it comes with the repository, or run scripts/rebuild_bundled.sh")
    return path


@dataclass(frozen=True)
class SceneObject:
    """One glyph in a scene: its concept and name, box = x, y, w, h in pixels, and coarse position ("top left")."""

    concept: int
    name: str
    vendor: str
    box: tuple[int, int, int, int]
    position: str

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


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
        raise ValueError(f"n_objects must be between 1 and {MAX_OBJECTS}, got {n_objects!r}")
    if side < 16:
        raise ValueError(f"side must be at least 16 pixels, got {side!r}")
    if concepts is None:
        concepts = rng.choice(len(glyphs), n_objects, replace=False).tolist()
    if len(concepts) != n_objects or len(set(concepts)) != n_objects:
        raise ValueError(f"concepts must be {n_objects} different ones, got {concepts!r}")
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
    regions = tuple(_region_caption(item, rng) if augment else item.name for item in objects)
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


def coarse_position(box: tuple[int, int, int, int], side: int) -> str:
    """Where the box's centre is: "top", "bottom", "left", "right", two of them, or "middle"."""
    x, y, w, h = box
    across, down = (x + w / 2) / side, (y + h / 2) / side
    words = ["top"] if down < 0.42 else ["bottom"] if down > 0.58 else []
    words += ["left"] if across < 0.42 else ["right"] if across > 0.58 else []
    return " ".join(words) or "middle"


def plain_caption(objects: Sequence[SceneObject]) -> str:
    """One caption for a scene: the name of a single object, the relation of two, the positions of more."""
    if len(objects) == 1:
        return objects[0].name
    if len(objects) == 2:
        return _relation(*objects)
    return _listed(sorted(objects, key=lambda item: (item.centre[1], item.centre[0])))


def varied_caption(objects: Sequence[SceneObject], rng: np.random.Generator) -> str:
    """A true caption of random form and order."""
    order = [objects[i] for i in rng.permutation(len(objects))]
    form = rng.random()
    if len(order) == 1:
        name, where = order[0].name, order[0].position
        longer = (with_article(name), f"picture of {name}", f"{name} in the picture", f"{name} {where}")
        return (name, name, name, *longer)[int(form * (3 + len(longer)))]
    if form < 0.25:
        return " and ".join(item.name for item in order)
    if form < 0.35:
        return f"{with_article(order[0].name)} with " + " and ".join(item.name for item in order[1:])
    if form < 0.45:
        return " then ".join(o.name for o in sorted(order, key=lambda o: o.centre[0])) + " from left to right"
    if len(order) == 2 and form < 0.75:
        return _relation(*order)
    return _listed(order)


def with_article(name: str) -> str:
    """The name with "a" or "an"; plurals (glasses, not glass or octopus) stay as they are."""
    if name.endswith("s") and not name.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _relation(first: SceneObject, second: SceneObject) -> str:
    across = second.centre[0] - first.centre[0]
    down = second.centre[1] - first.centre[1]
    if abs(across) >= abs(down):
        return f"{first.name} {'left' if across > 0 else 'right'} of {second.name}"
    return f"{first.name} {'above' if down > 0 else 'below'} {second.name}"


def _listed(objects: Sequence[SceneObject]) -> str:
    """Names with positions, without the positions where that would be too long."""
    caption = " and ".join(f"{item.name} {item.position}" for item in objects)
    return caption if len(caption.split()) <= MAX_CAPTION_WORDS else " and ".join(item.name for item in objects)


def _region_caption(item: SceneObject, rng: np.random.Generator) -> str:
    return (item.name, item.name, with_article(item.name), f"{item.name} {item.position}")[rng.integers(4)]


def image_tensor(image: np.ndarray, statistics: Statistics = CLIP) -> torch.Tensor:
    """(H, W, 3) uint8 to a float tensor (3, H, W), normalised with a mean and standard deviation."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in statistics)
    return torch.from_numpy(image.transpose(2, 0, 1) * (1 / (255 * std)) - mean / std)


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
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects must be between 1 and {MAX_OBJECTS}, got {max_objects!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length!r}")
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
            raise ValueError(f"side must be a multiple of patch = {patch}, got {self.side!r}")
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
            raise ValueError(f"split must be 'scenes', 'unseen_scenes' or 'unseen_glyphs', got {split!r}")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects must be between 1 and {MAX_OBJECTS}, got {max_objects!r}")
        singles = split == "unseen_glyphs" or max_objects == 1
        if n < 1 or (split != "unseen_glyphs" and singles and n > len(glyphs)):
            raise ValueError(f"n must be between 1 and the number of different captions, got {n!r}")
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


def export_public(
    root: str | Path,
    n_images: int,
    glyphs: Glyphs,
    *,
    side: int = 224,
    max_objects: int = MAX_OBJECTS,
    seed: int = 0,
) -> list[Path]:
    """Write scenes as image files and annotations in the public layouts, for whatever reads those.

    Each of `images/{coco,vg,cc3m,sbu}/bundled` under `root` gets `n_images` PNG files of training scenes, and coco's as
    many for validation and for test. Captions of training files say what is there and not where, since readers of these
    layouts crop and mirror images. Test is `BundledRetrieval` of the same seed and side, validation that of seed + 1.

    Returns:
        The annotation files, `data/pretrain/*.json` and `data/finetune/itr/*.json`.

    Raises:
        ValueError: one of the annotation files is there already; nothing is written then.
    """
    if n_images < 1:
        raise ValueError(f"n_images must be at least 1, got {n_images!r}")
    pretrain = ("cc3m_pretrain", "sbu_pretrain", "coco_karpathy_gby_image", "vg_dense_gby_image", "vg_regions")
    files = [Path(root, "data", "pretrain", f"{name}.json") for name in pretrain]
    files += [Path(root, "data", "finetune", "itr", f"coco_{split}.json") for split in ("train", "val", "test")]
    taken = [path for path in files if path.exists()]
    if taken:
        raise ValueError(f"{taken[0]}: already exists and is not overwritten; choose another folder")
    drawn = {}
    for number, source in enumerate(("cc3m", "sbu", "coco", "vg")):
        generators = [_generator(seed, "export", number, i) for i in range(n_images)]
        scenes = [
            draw_scene(glyphs, rng, glyphs.train_vendors, side, int(rng.integers(1, max_objects + 1)))
            for rng in generators
        ]
        drawn[source] = _save_images(root, source, "", scenes)
    for split, offset in (("val_", 1), ("test_", 0)):
        items = BundledRetrieval(glyphs, "scenes", n_images, side=side, max_objects=max_objects, seed=seed + offset)
        drawn[split] = _save_images(root, "coco", split, [items.scene(i) for i in range(len(items))])
    records = [[_pair(path, scene, source) for path, scene in drawn[source]] for source in ("cc3m", "sbu", "coco")]
    records += [[_dense(path, scene) for path, scene in drawn["vg"]], [_regions(*pair) for pair in drawn["vg"]]]
    records += [[_fine_tuned(i, *pair) for i, pair in enumerate(drawn["coco"])]]
    records += [[_tested(*pair) for pair in drawn[split]] for split in ("val_", "test_")]
    for path, content in zip(files, records, strict=True):
        _write(path, (json.dumps(content, indent=1) + "\n").encode())
    return files


def _names(scene: Scene) -> str:
    return " and ".join(item.name for item in scene.objects)


def _pair(path: str, scene: Scene, source: str) -> dict[str, Any]:
    return {"image": path, "caption": _names(scene), "dataset": source}


def _dense(path: str, scene: Scene) -> dict[str, Any]:
    boxes = [list(item.box) for item in scene.objects]
    return {"image": path, "caption": [item.name for item in scene.objects], "bb": boxes, "dataset": "vg"}


def _regions(path: str, scene: Scene) -> dict[str, Any]:
    elems = [{"bb": list(item.box), "caption": item.name} for item in scene.objects]
    return {"image": path, "caption": _names(scene), "elems": elems}


def _fine_tuned(i: int, path: str, scene: Scene) -> dict[str, Any]:
    # Paths below images/coco: the other one of the two public kinds.
    return {"image": path.removeprefix("images/coco/"), "caption": _names(scene), "image_id": f"coco_{i}"}


def _tested(path: str, scene: Scene) -> dict[str, Any]:
    return {"image": path.removeprefix("images/coco/"), "caption": [scene.caption]}


def _save_images(root: str | Path, source: str, prefix: str, scenes: Sequence[Scene]) -> list[tuple[str, Scene]]:
    """Write scenes as PNG; returns them with their paths relative to the root."""
    saved = []
    for i, scene in enumerate(scenes):
        path, buffer = f"images/{source}/bundled/{prefix}{i + 1:012d}.png", io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "PNG")
        _write(Path(root, path), buffer.getvalue())
        saved.append((path, scene))
    return saved


def _write(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
