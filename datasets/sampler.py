"""The order in which samples are read; a run can stop and resume in it at any batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from datasets.place import ALONE, Place
from sparsity.errors import UserError


class ResumableSampler(Sampler[int]):
    """Running numbers n = epoch * size + index, epoch after epoch, each epoch in its own order.

    The whole stream is cut into batches of `batch_size` (a batch may span two epochs: nothing is dropped or repeated);
    batch b goes to rank b % world_size. A position in it is one integer, the batches that this rank has read, so a run
    resumes with `start` = its step. Give it to a DataLoader as `sampler` with the same `batch_size`, and keep Fabric
    from replacing it (`use_distributed_sampler=False`).

    Args:
        size: samples in the dataset (in one epoch).
        seed: order of the samples; the same on every rank.
        shuffle: a new permutation every epoch, or 0 .. size - 1.
        start: batches of this rank that are skipped, because they were read before.
        stop: batch of this rank at which the stream ends, counted from 0 (not from `start`); None is never.
        place: of this process.
        batch_size: samples in a batch of one rank.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = True,
        start: int = 0,
        stop: int | None = None,
        place: Place = ALONE,
    ):
        if size < 1 or batch_size < 1:
            raise UserError(f"size and batch_size must be at least 1, got {size!r} and {batch_size!r}")
        if start < 0 or (stop is not None and stop < 0):
            raise UserError(f"start and stop must not be negative, got {start!r} and {stop!r}")
        self.size, self.seed, self.batch_size, self.shuffle = size, seed, batch_size, shuffle
        self.start, self.stop, self.place = start, stop, place

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        step = self.start
        while self.stop is None or step < self.stop:
            first = self.place.batch(step) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self._order(epoch)
                yield epoch * self.size + int(order[position % self.size])
            step += 1

    def __len__(self) -> int:
        """Running numbers from `start` to `stop`; raises TypeError without a stop: an endless stream has no length."""
        if self.stop is None:
            raise TypeError("a ResumableSampler without stop never ends")
        return max(0, self.stop - self.start) * self.batch_size

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).permutation(self.size)


def sample_generator(n: int, size: int, seed: int) -> tuple[int, np.random.Generator]:
    """Index of running number n in a dataset of `size` samples, and the generator of that sample in that epoch.

    What a sample draws depends on (seed, epoch, index) alone, never on workers, ranks or the order of reading.
    """
    if n < 0:
        raise IndexError(f"a running number must not be negative, got {n!r}")
    epoch, index = divmod(n, size)
    return index, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, index)))
