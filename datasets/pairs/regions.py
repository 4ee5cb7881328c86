"""Images with described regions (Visual Genome's `vg_regions.json`), as XVLM learns from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.decoding import Decoding
from datasets.annotations import Folders, Records, get_box, get_path, get_texts, shown
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.pairs.pretraining import read_sources
from datasets.sampler import sample_generator
from datasets.text import TextEncoder, mentions_side
from datasets.transforms import RegionTransform, box_attention
from sparsity.errors import UserError

log = logging.getLogger(__name__)
EXPECTED = (
    '{"image": path, "caption": optional text or [text], '
    '"elems": [{"bb": [x, y, w, h], "caption": text or [text], "attributes": optional text or [text]}]}'
)
WHOLE = np.array([[0.5, 0.5, 1.0, 1.0]])  # the box of a whole image


class RegionDataset(Dataset):
    """One image with the descriptions of up to `max_regions` of its regions, of which the whole image may be one.

    It is indexed by a running number n = epoch * len(dataset) + index. An item is {"image": (3, H, W), "regions": list}
    and a region has the fields of `TextEncoder`, `image_atts` (1 + patches,), `target_bbox` (4,) = cx, cy, w, h in
    [0, 1] of the image as it is given, and `is_image`, 1 for the whole image. An image that cannot be read, or inside
    which no region lies, gives `Skipped`. Batches: `collate_regions`.

    Args:
        sources: pairs of annotation file and image folder, or folders by the "dataset" of the records.
        text: encodes the descriptions.
        image_res, patch_size: side of the images and of their patches in pixels.
        seed: of all that is drawn.
        max_regions: most regions of an image.
        min_box: least width and height of a region in pixels of the file's image; smaller ones are left out.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: a file or folder is missing, or none of the images looked up is in its folder.
        UserError: an annotation file is not as expected, or no record has a region or a caption.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, Folders]],
        text: TextEncoder,
        image_res: int,
        patch_size: int,
        *,
        seed: int,
        max_regions: int = 5,
        min_box: float = 1.0,
        decoding: Decoding = DEFAULT,
    ):
        if max_regions < 1:
            raise UserError(f"max_regions must be at least 1, got {max_regions!r}")
        if image_res % patch_size:
            raise UserError(f"image_res must be a multiple of patch_size = {patch_size!r}, got {image_res!r}")
        self.min_box, self.max_regions = min_box, max_regions
        self.roots, records = read_sources(sources, partial(parse_regions, min_box=min_box), EXPECTED, decoding)
        useful = [record for record in records if record[1][1] or record[1][2]]
        if not useful:
            files = ", ".join(str(source[0]) for source in sources)
            raise UserError(f"{files}: no record has a caption or an element of at least {min_box:g} pixels")
        if len(useful) < len(records):
            log.info("%d of %d images have neither caption nor region", len(records) - len(useful), len(records))
        self.records = Records(useful)
        self.transform, self.grid = RegionTransform(image_res), image_res // patch_size
        self.text, self.seed = text, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        source, (path, captions, elems) = self.records[index]
        image = self.roots[source].load(path)
        if isinstance(image, Skipped):
            return image
        boxes = np.array([box for box, _, _ in elems]).reshape(-1, 4)
        boxes, inside = clip_boxes(boxes, image.size, self.min_box)
        elems = [elem for elem, ok in zip(elems, inside, strict=True) if ok]
        if not captions and not elems:
            return Skipped(str(self.roots[source].find(path)), "no region lies inside the image")
        flip = not any(mentions_side(t) for t in (*captions, *(t for _, ts, atts in elems for t in (*ts, *atts))))
        pixels, boxes, kept = self.transform(image, boxes[inside], rng, flip)
        regions = [self._region(_draw(captions, rng), WHOLE, True, rng)] if captions else []
        for i in rng.permutation(np.flatnonzero(kept))[: self.max_regions - len(regions)]:
            regions.append(self._region(self._describe(elems[i], rng), boxes[i : i + 1], False, rng))
        return {"image": pixels, "regions": regions}

    def _region(self, caption: str, box: np.ndarray, whole: bool, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        return {
            **self.text(caption, rng),
            "image_atts": box_attention(box, self.grid)[0],
            "target_bbox": torch.from_numpy(box[0].astype(np.float32)),
            "is_image": torch.tensor(int(whole)),
        }

    @staticmethod
    def _describe(elem: tuple, rng: np.random.Generator) -> str:
        _, captions, attributes = elem
        caption = _draw(captions, rng)
        return f"{_draw(attributes, rng)} {caption}" if attributes else caption


def parse_regions(record: dict, min_box: float = 1.0) -> tuple[str, list[str], list[tuple]]:
    """Image path, captions of the whole image, and (box, captions, attributes) of the regions of enough size."""
    elems = record.get("elems")
    if not isinstance(elems, list) or not all(isinstance(elem, dict) for elem in elems):
        raise UserError(f"'elems' must be a list of regions, got {shown(elems)}")
    regions = [(get_box(e.get("bb")), get_texts(e, "caption"), _optional(e, "attributes")) for e in elems]
    large = [region for region in regions if min(region[0][2:]) >= min_box]
    return get_path(record), _optional(record, "caption"), large


def clip_boxes(boxes: np.ndarray, size: tuple[int, int], min_box: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) of x, y, w, h cut to an image of `size` = (width, height), and which of them stay large enough."""
    low = np.clip(boxes[:, :2], 0, size)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, size)
    sides = high - low
    return np.concatenate((low, sides), axis=1), (sides >= min_box).all(axis=1) & (sides > 0).all(axis=1)


def _optional(record: dict, key: str) -> list[str]:
    return [] if record.get(key) in (None, "", []) else get_texts(record, key)


def _draw(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
