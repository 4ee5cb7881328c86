"""CIFAR-10 and CIFAR-100, downloaded and read by torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from datasets.sampler import sample_generator
from sparsity.errors import UserError
from sparsity.files import used_up

READERS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


class CifarDataset(Dataset):
    """Images of 32 x 32 with one label each, all in memory.

    It is indexed by a running number n = epoch * len(dataset) + index, and an item is {"image": (3, H, W), "label": ()
    int64}.

    The public files are pickles. torchvision unpickles them only where their MD5 sums are the published ones, so that
    nothing but the known content is ever unpickled.

    Args:
        name: "cifar10" or "cifar100", by its fine labels.
        train: the 50,000 images for training or the 10,000 for testing.
        transform: (RGB image, generator) -> tensor.
        seed: of all that is drawn.
        root: folder of torchvision's; what is missing there is downloaded, by one process at a time.

    Raises:
        UserError: the files are not there, or are others, and cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        train: bool,
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        *,
        seed: int,
        root: str | Path,
    ):
        public = _read(READERS[name], Path(root), train)
        self.images = public.data  # (N, 32, 32, 3) uint8
        self.labels = np.array(public.targets, dtype=np.int64)
        self.class_names, self.transform, self.seed = tuple(public.classes), transform, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        index, rng = sample_generator(n, len(self), self.seed)
        image = self.transform(Image.fromarray(self.images[index]), rng)
        return {"image": image, "label": torch.tensor(self.labels[index])}


def _read(reader: type[CIFAR10], root: Path, train: bool) -> CIFAR10:
    try:
        return reader(root, train=train)
    except RuntimeError:  # not there, or not as published
        pass
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f".{reader.base_folder}.lock"):
            return reader(root, train=train, download=True)  # does nothing where another process has just done it
    except (OSError, RuntimeError) as error:
        if used_up(error):
            raise
        raise UserError(
            f"{root / reader.base_folder}: not there as published, and {reader.url} cannot be downloaded "
            f"({error}): unpack that file in {root}"
        ) from error
