"""So many images of a dataset to calibrate on, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages, collate
from datasets.place import ALONE, Place
from sparsity.errors import UserError

HELD = 1 << 30  # bytes of images that are kept for the next pass


class Samples:
    """Batches (images, labels) of `count` images drawn from a dataset, the same however large the batches are. They are
    kept in memory where they need at most `HELD`, else read at each pass.

    Batch b goes to rank b % world_size. The same attributes as `datasets.calibration.data_kinds.Lockstep`, whose epochs
    it has one of.

    Args:
        data: items {"image", "label"}, or `Skipped`.
        folder: where unreadable images are listed; more than `max_skipped` of them is an error.

    Raises:
        UserError: there are fewer images.
    """

    def __init__(
        self,
        data: Dataset,
        count: int,
        batch_size: int,
        folder: Path,
        *,
        seed: int,
        workers: int = 0,
        max_skipped: float = 0.01,
        place: Place = ALONE,
    ):
        if count > len(data):
            raise UserError(f"--nsamples {count}: there are only {len(data)} images to calibrate on")
        chosen = np.random.default_rng(seed).permutation(len(data))[:count].tolist()
        batches = [chosen[first : first + batch_size] for first in range(0, count, batch_size)]
        self.rounds = [int(place.has(number)) for number in range(len(batches))]
        self.numbers = [number for number, own in enumerate(self.rounds) if own]
        own = [index for number in self.numbers for index in batches[number]]
        self._loader = DataLoader(Subset(data, own), batch_size, collate_fn=collate, num_workers=workers)
        self._held: list[tuple[Tensor, Tensor]] | None = None
        self._skipped = SkippedImages(skipped_path(folder, place.rank), max(1, len(own)), max_skipped)

    def at(self, epoch: int) -> Samples:
        return self

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._held is not None:
            yield from self._held
            return
        held, room = [], HELD
        for batch in self._skipped.watch(self._loader):
            room -= batch["image"].nbytes
            if room >= 0:
                held.append((batch["image"], batch["label"]))
            yield batch["image"], batch["label"]
        self._held = held if room >= 0 else None
        self._skipped.count = 0  # the same images at each pass
