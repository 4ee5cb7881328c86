"""Image-text pairs for pretraining and pruning: CC3M, SBU, COCO and dense Visual Genome captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.decoding import Decoding
from datasets.annotations import Folders, ImageRoot, Records, get_box, get_path, get_texts, read_by_folder
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.sampler import sample_generator
from datasets.text import TextEncoder
from sparsity.errors import UserError

EXPECTED = '{"image": path, "caption": text or [text], "bb": optional [x, y, w, h], one or one per caption}'


class ImageTextDataset(Dataset):
    """Samples of one or several annotation files such as `cc3m_pretrain.json` or `vg_dense_gby_image.json`.

    A record with several captions gives one of them, drawn, and the part of the image in its box where there is one.
    It is indexed by a running number n = epoch * len(dataset) + index, and gives the image as `transform` makes it,
    (3, H, W), with the fields of `TextEncoder`; or `Skipped` where the image cannot be read. Batches: `collate`.

    Args:
        sources: pairs of annotation file and image folder, or folders by the "dataset" of the records.
        transform: (RGB image, generator) -> tensor.
        text: encodes the captions.
        seed: of all that is drawn.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: a file or folder is missing, or none of the images looked up is in its folder.
        UserError: an annotation file is not as expected.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, Folders]],
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        text: TextEncoder,
        *,
        seed: int,
        decoding: Decoding = DEFAULT,
    ):
        self.roots, records = read_sources(sources, parse_pair, EXPECTED, decoding)
        self.records = Records(records)
        self.transform, self.text, self.seed = transform, text, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        source, (path, captions, boxes) = self.records[index]
        image = self.roots[source].load(path)
        if isinstance(image, Skipped):
            return image
        drawn = int(rng.integers(len(captions)))
        if boxes:
            image = crop_to(image, boxes[drawn % len(boxes)])  # one box for all the captions, or one for each
        if image is None:
            return Skipped(str(self.roots[source].find(path)), f"the box of caption {drawn} lies outside the image")
        return {"image": self.transform(image, rng), **self.text(captions[drawn], rng)}


def read_sources(
    sources: Sequence[tuple[str | Path, Folders]],
    parse: Callable[[dict], tuple],
    expected: str,
    decoding: Decoding,
) -> tuple[list[ImageRoot], list[tuple[int, tuple]]]:
    """Image folders, and all the records as (number of the folder, what `parse` keeps, the image path first)."""
    if not sources:
        raise UserError("at least one pair of annotation file and image folder is needed, got none")
    roots, records = [], []
    for annotation_file, folders in sources:
        for folder, found in read_by_folder(annotation_file, folders, parse, expected):
            root = ImageRoot(folder, decoding)
            root.check(annotation_file, [record[0] for record in found])
            records += [(len(roots), record) for record in found]
            roots.append(root)
    return roots, records


def parse_pair(record: dict) -> tuple[str, list[str], list[tuple[float, float, float, float]]]:
    """Image path, captions, and no box, one box, or one box for each caption."""
    captions = get_texts(record, "caption")
    boxes = record.get("bb")
    if boxes in (None, []):
        boxes = []
    elif not (isinstance(boxes, list) and isinstance(boxes[0], list)):
        boxes = [boxes]
    boxes = [get_box(box) for box in boxes]
    if len(boxes) not in (0, 1, len(captions)):
        raise UserError(f"'bb' must hold one box or one per caption, got {len(boxes)} for {len(captions)} captions")
    return get_path(record), captions, boxes


def crop_to(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image | None:
    """The part of an image inside the box x, y, width, height, in whole pixels; None where there is none."""
    x, y, w, h = box
    left, top = max(0, int(x)), max(0, int(y))
    right, bottom = min(image.width, round(x + w)), min(image.height, round(y + h))
    return image.crop((left, top, right, bottom)) if right > left and bottom > top else None
