"""Batches of a user's own items: all of them, the last partial batch too, but for those that are held out."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch.utils.data import DataLoader

from configs.pruning import PrunedModel
from datasets.calibration.data_kinds import skipped_path
from datasets.calibration.held_out import places
from datasets.collate import SkippedImages
from datasets.place import ALONE, Place
from sparsity.errors import UserError

log = logging.getLogger(__name__)

HELD_OUT = 8  # one of so many items is held out,
MOST_HELD = 256  # but no more than these
SPLIT_SEED = 0  # of the items that are held out, whatever the seed of a run


class Split(NamedTuple):
    """Indices of the items to calibrate on, and of those that are held out."""

    calibration: list[int]
    held: list[int]


def split(count: int) -> Split:
    """Return which of `count` items are held out for an evaluation: drawn with `SPLIT_SEED`, one in `HELD_OUT`, at
    least one and at most `MOST_HELD`. The only item of one is in both.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    if count < 2:
        return Split(order, order)
    held = min(MOST_HELD, max(1, count // HELD_OUT))
    return Split(sorted(order[held:]), sorted(order[:held]))


class Items(Protocol):
    """A dataset by running numbers n = pass * len + index. told: what it holds, in a few words."""

    told: str

    def __len__(self) -> int: ...

    def __getitem__(self, n: int) -> Any: ...


class Numbered:
    """Batches that are counted from the first epoch on, `batches` an epoch; batch b goes to rank b % world_size."""

    place: Place
    epoch: int
    batches: int

    def at(self, epoch: int) -> Self:
        """Return the same data with the batches that follow those of the epochs before; this one is epoch 0."""
        later = copy.copy(self)
        later.epoch = epoch
        return later

    @property
    def rounds(self) -> list[int]:
        """How many batches of each round, of one batch, this rank reads."""
        return [int(self.place.has(number)) for number in self._numbers()]

    @property
    def numbers(self) -> list[int]:
        """The numbers of this rank's batches."""
        return [number for number in self._numbers() if self.place.has(number)]

    def __len__(self) -> int:
        return len(self.numbers)

    def _numbers(self) -> range:
        return range(self.epoch * self.batches, (self.epoch + 1) * self.batches)


class OwnData(Numbered):
    """At most `num_batches` batches an epoch, in the same order for the same seed; batch b goes to rank
    b % world_size. The same attributes as `datasets.calibration.data_kinds.Lockstep`.

    Each pass over the items has its own order, and its last batch may be smaller; an epoch goes on where the one before
    has ended.

    Args:
        gather: items, some of them perhaps `Skipped`, -> {"batch": batch, "skipped": those}.
        config: has `batch_size`, `workers` and `max_skipped`.
        folder: where what cannot be read is listed.
        chosen: indices of the items that are read (default: all).

    unlabelled: why batches have no labels, where they should.
    """

    passed = 0  # of this rank's batches of the epoch, those that are left out at its beginning

    def __init__(
        self,
        data: Items,
        gather: Callable[[list[Any]], dict[str, Any]],
        config: PrunedModel,
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
        chosen: Sequence[int] | None = None,
    ):
        self.unlabelled: UserError | None = None
        self.data, self.gather, self.config, self.seed, self.place = data, gather, config, seed, place
        self.chosen = list(range(len(data))) if chosen is None else list(chosen)
        self.epoch, self.in_a_pass = 0, math.ceil(len(self.chosen) / config.batch_size)
        self.batches = min(num_batches, self.in_a_pass)
        expected = sum(len(self.items_of(number)) for number in self.numbers)
        self.skipped = SkippedImages(skipped_path(folder, place.rank), max(1, expected), config.max_skipped)
        self.told = f"{data.told}; {self.batches} batches of at most {config.batch_size} an epoch"
        if len(self.chosen) < len(data):
            self.told += f", from {len(self.chosen)} of the {len(data)}"

    unit, batches_in_round = "items", 1

    @property
    def samples(self) -> int:
        """The items, whether they are read or not."""
        return len(self.chosen)

    def split(self, seed: int, most: int) -> tuple[OwnData, OwnData]:
        """Return the data without a tenth of its items, and that tenth, of which at most `most` batches are read. Which
        items these are depends on the seed alone.
        """
        rest, held = places(len(self.chosen), seed, "item")
        return self._part(rest.tolist(), self.batches), self._part(held.tolist(), most)

    def stream(self, start: int = 0) -> Iterator[Any]:
        """Yield this rank's batches epoch after epoch, without end and without the first `start`."""
        for epoch in count(self.epoch):
            own = self.at(epoch)
            own.passed = min(start, len(own))
            start -= own.passed
            if own.passed < len(own):
                yield from own

    def _part(self, chosen: Sequence[int], num_batches: int) -> OwnData:
        """Return the data of some of the chosen items, from epoch 0 on."""
        part = self.at(0)
        part.chosen = [self.chosen[i] for i in chosen]
        part.in_a_pass = math.ceil(len(part.chosen) / self.config.batch_size)
        part.batches = min(num_batches, part.in_a_pass)
        return part

    def __iter__(self) -> Iterator[Any]:
        wanted = [self.items_of(number) for number in self.numbers[self.passed :]]
        self.skipped.count = 0  # in each pass the same items
        options = {"num_workers": self.config.workers, "pin_memory": torch.cuda.is_available()}
        read = DataLoader(self.data, batch_sampler=wanted, collate_fn=self.gather, **options)  # pyright: ignore[reportArgumentType]
        for gathered in self.skipped.watch(read):
            yield gathered["batch"]

    def items_of(self, number: int) -> list[int]:
        """Return the running numbers of the items in a batch."""
        turn, place = divmod(number, self.in_a_pass)
        order, size = _order(self.seed, turn, len(self.chosen)), self.config.batch_size
        return [turn * len(self.data) + self.chosen[i] for i in order[place * size : (place + 1) * size]]


@lru_cache(maxsize=2)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    """Return the order of the items in a pass over them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(turn,))).permutation(count)
