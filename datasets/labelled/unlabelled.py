"""Images without labels, of which a model learns what a dense one makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.decoding import Decoding
from datasets.annotations import ImageRoot, Records
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.sampler import sample_generator


class UnlabelledImages(Dataset):
    """Images of a folder, by running numbers n = epoch * len(dataset) + index.

    An item is {"image": (3, H, W)}, what `transform` makes of an RGB image and a generator, or `Skipped` where the
    image cannot be read. paths: in the folder.
    """

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str],
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        *,
        seed: int,
        decoding: Decoding = DEFAULT,
    ):
        self.root, self.records = ImageRoot(root, decoding), Records(paths)
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        image = self.root.load(self.records[index])
        return image if isinstance(image, Skipped) else {"image": self.transform(image, rng)}
