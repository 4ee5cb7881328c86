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
        self, data: CaptionedImages, transform: Callable[[Image.Image], Any] = lambda image: image, limit: int | None = None
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


class GatherPairs:
    """Items of `OwnPairs` or `OwnImages` to a batch of a model that preprocesses them itself, with the samples that were
    skipped under "skipped" (see `datasets.collate.collate`); picture: what an item of `OwnPairs` is made of.

    images, texts: RGB images, and captions, to fields of a batch. Items without a caption have images alone.
    """

    def __init__(
        self,
        images: Callable[[Sequence[Image.Image]], dict[str, torch.Tensor]],
        texts: Callable[[Sequence[str]], dict[str, torch.Tensor]],
    ):
        self.images, self.texts = images, texts

    @staticmethod
    def picture(image: Image.Image, caption: str, rng: np.random.Generator) -> dict[str, Any]:
        """Return an item as it is gathered here."""
        return {"image": image, "caption": caption}

    def __call__(self, items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
        read = [item for item in items if not isinstance(item, Skipped)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        batch: dict[str, Any] = {"skipped": skipped} if skipped else {}
        if read:
            batch |= self.images([item["image"] for item in read])
            if "caption" in read[0]:
                batch |= self.texts([item["caption"] for item in read])
            batch |= {name: torch.stack([item[name] for item in read]) for name in _NUMBERS if name in read[0]}
        return batch


_NUMBERS = ("sample_ids", "index")
