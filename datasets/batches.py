"""Calibration batches of any model: from a folder of images, or from a function of the user's."""

import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from datasets.calibration import skipped_path
from datasets.collate import SkippedImages
from datasets.image_folder import Gather, ImageFolder
from datasets.loaders import loader

log = logging.getLogger(__name__)


class Batches:
    """`count` batches an epoch, of which batch b goes to rank b % world_size.

    Iterating reads this rank's share of the epoch. `len` counts it, `numbers` are the places of its batches in the
    order of one rank alone over all epochs, and `rounds` says how many of each batch this rank reads: 1 or 0.
    `at(epoch)` has the batches of another epoch.
    """

    def __init__(self, count: int, rank: int = 0, world_size: int = 1):
        self.count, self.rank, self.world_size, self.epoch = count, rank, world_size, 0

    def at(self, epoch: int) -> "Batches":
        later = copy.copy(self)
        later.epoch = epoch
        return later

    @property
    def numbers(self) -> list[int]:
        first = self.epoch * self.count
        return [b for b in range(first, first + self.count) if b % self.world_size == self.rank]

    @property
    def rounds(self) -> list[int]:
        own = set(self.numbers)
        return [int(b in own) for b in range(self.epoch * self.count, (self.epoch + 1) * self.count)]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


class FolderBatches(Batches):
    """At most `num_batches` batches an epoch of a folder's images, in an order drawn anew for each pass over it.

    folder: where images that cannot be read are listed; more than `max_skipped` of them is an error.
    """

    def __init__(
        self,
        images: str | Path,
        preprocess: Callable[..., Any],
        folder: Path,
        num_batches: int,
        seed: int,
        *,
        batch_size: int,
        workers: int = 0,
        max_skipped: float = 0.01,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data, self.seed = ImageFolder(images, seed=seed), seed
        self.gather = Gather(self.data, preprocess)
        self.batch_size, self.workers, self.max_skipped = min(batch_size, len(self.data)), workers, max_skipped
        available = len(self.data) // self.batch_size
        if available < num_batches:
            log.info("%s has %d batches, fewer than the %d asked for", images, available, num_batches)
        self.skipped_path = skipped_path(folder, rank)
        super().__init__(min(num_batches, available), rank, world_size)

    def __iter__(self) -> Iterator[Any]:
        own = [number // self.world_size for number in self.numbers]
        if not own:
            return
        place = {"rank": self.rank, "world_size": self.world_size, "start": own[0], "stop": own[-1] + 1}
        read = loader(self.data, self.batch_size, self.gather, seed=self.seed, workers=self.workers, **place)
        skipped = SkippedImages(self.skipped_path, len(own) * self.batch_size, self.max_skipped)
        for gathered in skipped.watch(read):
            yield gathered["batch"]


class LoaderBatches(Batches):
    """At most `num_batches` batches an epoch of what a function of the user's returns.

    make: returns an iterable of batches; called for each epoch, on each rank, with `seed` and `epoch` if it has
    arguments of these names, and always to return the same for the same. The number of batches is its length; where it
    has none, `num_batches`.
    """

    def __init__(
        self, make: Callable[..., Iterable[Any]], name: str, num_batches: int, seed: int, rank: int, world_size: int
    ):
        self.make, self.name, self.seed, self.epoch = make, f"--calibration {name}", seed, 0
        batches = self._made()
        length = len(batches) if isinstance(batches, Sized) else num_batches
        if length == 0:
            raise ValueError(f"{self.name}: there is no batch in what it returns")
        if length < num_batches:
            log.info("%s has %d batches, fewer than the %d asked for", name, length, num_batches)
        super().__init__(min(num_batches, length), rank, world_size)

    def __iter__(self) -> Iterator[Any]:
        own, found = set(self.numbers), 0
        for found, batch in enumerate(itertools.islice(self._made(), self.count), 1):
            if self.epoch * self.count + found - 1 in own:
                yield batch
        if found < self.count:
            way_out = f"give --num_batches {found}, or return something with a length"
            raise ValueError(f"{self.name}: ended after {found} of {self.count} batches: {way_out}")

    def _made(self) -> Iterable[Any]:
        known = {"seed": self.seed, "epoch": self.epoch}
        wanted = inspect.signature(self.make).parameters
        batches = self.make(**{name: value for name, value in known.items() if name in wanted})
        if not isinstance(batches, Iterable):
            raise ValueError(f"{self.name}: expected an iterable of batches, got {type(batches).__name__}")
        return batches
