"""A user's own images with captions as what is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from datasets.annotations import Records
from datasets.collate import Skipped
from datasets.own.captions import CaptionedImages
from datasets.sampler import sample_generator


class OwnPairs(Dataset):
    """Image-caption pairs, one item for each caption, by running numbers n = epoch * len(dataset) + index.

    An item is what `make(RGB image, caption, generator)` gives, a mapping, and the "sample_ids" of its image, or
    `Skipped` where the image cannot be read.
    """

    def __init__(
        self,
        data: CaptionedImages,
        make: Callable[[Image.Image, str, np.random.Generator], dict[str, Any]],
        *,
        seed: int,
    ):
        self.images, self.make, self.seed = data.images, make, seed
        self.records = Records(
            (own.image, caption, number) for number, own in enumerate(data.records) for caption in own.captions
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        name, caption, number = self.records[index]
        image = self.images.load(name)
        if isinstance(image, Skipped):
            return image
        return {**self.make(image, caption, rng), "sample_ids": torch.tensor(number)}


class OwnImages(Dataset):
    """Images with their captions, to be found by them or described: item i is {"image": what `transform` makes of the
    RGB image, "index": i}, or `Skipped`. limit: only the first so many images.

    Attributes:
        ids: name of each image.
        references: the captions of each.
        texts: all captions.
        txt2img: for each caption the number of its image.
        img2txt: for each image the numbers of its captions.
    """

    def __init__(
        self,
        data: CaptionedImages,
        transform: Callable[[Image.Image], Any] = lambda image: image,
        limit: int | None = None,
    ):
        records = data.records[:limit]
        self.images, self.transform = data.images, transform
        self.ids: Sequence[int | str] = [record.image for record in records]
        self.references = [record.captions for record in records]
        self.texts = [caption for captions in self.references for caption in captions]
        self.txt2img = [i for i, captions in enumerate(self.references) for _ in captions]
        self.img2txt: list[list[int]] = [[] for _ in records]
        for text, image in enumerate(self.txt2img):
            self.img2txt[image].append(text)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any] | Skipped:
        image = self.images.load(str(self.ids[i]))
        if isinstance(image, Skipped):
            return image
        return {"image": self.transform(image), "index": torch.tensor(i)}


class Gather:
    """Items to a batch of a model that preprocesses images and texts itself; the samples that were skipped stand under
    "skipped", see `datasets.collate.collate`.

    make: items that were read -> fields of a batch.
    """

    def __init__(self, make: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]):
        self.make = make

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        read = [item for item in items if not isinstance(item, Skipped)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        return (self.make(read) if read else {}) | ({"skipped": skipped} if skipped else {})


def picture(image: Image.Image, caption: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return an item of `OwnPairs` as such a model preprocesses it."""
    return {"image": image, "caption": caption}
