"""Image-text pairs in WebDataset shards, streamed: what is read when does not depend on ranks or workers."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from configs.decoding import Decoding
from configs.shard_names import HOW_TO_GET, shard_paths
from datasets.collate import Skipped
from datasets.images import DEFAULT, decode_image
from datasets.pairs.tars import Sample, miscounted, open_shard, read_shard
from datasets.place import ALONE, Place
from datasets.sampler import sample_generator
from datasets.text import TextEncoder
from sparsity.errors import UserError

log = logging.getLogger(__name__)
STREAMS = 16


class ShardDataset:
    """Samples of shards in img2dataset's layout, with the items of `ImageTextDataset`. Batches: `shard_loader`.

    A pass reads every sample once. Its order is a function of (seed, epoch): the shards are permuted, and inside a
    shard each run of `block` samples is. What is drawn for a sample depends on (seed, epoch, its index), the index
    counting through the shards as they were given.

    Args:
        images: shards, each a name as `configs.shard_names.shard_paths` takes it.
        transform: (RGB image, generator) -> tensor.
        text: encodes the captions.
        seed: of all that is drawn.
        streams: places of a pass at which is read at the same time; consecutive batches come from different ones.
        block: samples whose encoded images are held in memory, for each stream.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: a shard is missing.
        UserError: a shard is damaged or cut off, or its first sample has no image or no caption.
    """

    def __init__(
        self,
        images: Sequence[str],
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        text: TextEncoder,
        *,
        seed: int,
        streams: int = STREAMS,
        block: int = 256,
        decoding: Decoding = DEFAULT,
    ):
        for name, value in (("streams", streams), ("block", block)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value!r}")
        paths = [path for name in images for path in shard_paths(name)]
        counts = [open_shard(path) for path in tqdm(paths, desc="shards", delay=2, leave=False)]
        if not sum(counts):
            raise UserError(f"{', '.join(images)}: no sample in these shards; {HOW_TO_GET}")
        self.paths, self.counts = paths, np.array(counts, dtype=np.int64)
        self.first = np.cumsum(self.counts) - self.counts  # index of the first sample of each shard
        self.transform, self.text, self.seed, self.streams, self.block = transform, text, seed, streams, block
        self.decoding = decoding

    def __len__(self) -> int:
        """Samples in a pass."""
        return int(self.counts.sum())

    def read(self, epoch: int, place: int) -> Iterator[tuple[int, Sample]]:
        """The samples of a pass in its order, from place `place` on, with their indices."""
        order = self._generator(epoch).permutation(len(self.paths))
        ends = np.cumsum(self.counts[order])
        start = int(np.searchsorted(ends, place, side="right"))
        done = place - (int(ends[start - 1]) if start else 0)
        for shard in order[start:]:
            yield from self._read_shard(int(shard), epoch, done)
            done = 0

    def _read_shard(self, shard: int, epoch: int, done: int) -> Iterator[tuple[int, Sample]]:
        """A shard's samples in the order of a pass, without the first `done`, whose images are not decoded."""
        samples, count = read_shard(self.paths[shard]), int(self.counts[shard])
        for begin in range(0, count, self.block):
            size = min(self.block, count - begin)
            block = list(islice(samples, size))
            if len(block) < size or (begin + size == count and next(samples, None)):
                raise UserError(miscounted(self.paths[shard], count))
            if done < begin + size:
                order = self._generator(epoch, shard, begin).permutation(size)
                for i in order[max(0, done - begin) :]:
                    yield int(self.first[shard]) + begin + int(i), block[i]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def item(self, epoch: int, index: int, sample: Sample) -> dict[str, torch.Tensor] | Skipped:
        """The tensors of a sample, or why there are none."""
        if sample.image is None:
            return Skipped(sample.name, "the shard has no image for this sample")
        if sample.caption is None:
            return Skipped(sample.name, sample.fault)
        image = decode_image(io.BytesIO(sample.image), sample.name, self.decoding)
        if isinstance(image, Skipped):
            return image
        _, rng = sample_generator(epoch * len(self) + index, len(self), self.seed)
        return {"image": self.transform(image, rng), **self.text(sample.caption, rng)}


def shard_loader(
    dataset: ShardDataset,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    start: int = 0,
    stop: int | None = None,
    place: Place = ALONE,
    workers: int = 0,
) -> DataLoader:
    """Batches `start` to `stop` of this rank, pass after pass; see `ShardBatches`. `workers` processes read them.

    Warns where several processes read the same stretch.
    """
    batches = ShardBatches(dataset, batch_size, collate, start=start, stop=stop, place=place)
    readers = place.world_size * max(1, workers)
    if batches.streams % readers and not place.rank:
        told = "streams: %d stretches of the shards for %d processes (%d devices x %d workers): "
        told += "some are read more than once; make streams a multiple of %d"
        log.warning(told, batches.streams, readers, place.world_size, max(1, workers), readers)
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class ShardBatches(IterableDataset):
    """Collated batches of shards.

    A pass of n samples has ceil(n / batch_size) batches, each sample in one of them; the last one may be smaller.
    Batch b of all passes goes to rank b % world_size. Which samples batch b holds, in which order, and what is drawn
    for them is a function of (shards, seed, streams, block, batch_size, b), never of ranks and workers.

    The pass is cut into `streams` equal stretches of batches that are read side by side. Where streams is a multiple of
    world_size * workers, a stretch is read by one process only; otherwise several pass over the same bytes, and each
    decodes its own batches.

    Args:
        dataset, batch_size, collate: what is read, and how samples become a batch.
        start: batches of this rank that are skipped, because they were read before.
        stop: batch of this rank at which the stream ends, counted from 0 (not from `start`); None is never.
        place: of this process.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        start: int = 0,
        stop: int | None = None,
        place: Place = ALONE,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size!r}")
        if start < 0 or (stop is not None and stop < 0):
            raise UserError(f"start and stop must not be negative, got {start!r} and {stop!r}")
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.start, self.stop, self.reader = start, stop, place
        self.batches = -(-len(dataset) // batch_size)  # of a pass
        self.streams = min(dataset.streams, self.batches)

    def __len__(self) -> int:
        """Batches of this rank from `start` to `stop`; raises TypeError without a stop."""
        if self.stop is None:
            raise TypeError("ShardBatches without stop never end")
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        step, workers = (self.start + worker.id, worker.num_workers) if worker else (self.start, 1)
        epoch, streams = -1, {}
        while self.stop is None or step < self.stop:  # a DataLoader takes the batches of its workers in turn
            number, batch = divmod(self.reader.batch(step), self.batches)
            if number != epoch:
                epoch, streams = number, {}
            stream, place = self.place(batch)
            if stream not in streams:
                streams[stream] = _Stream(self.dataset, epoch, place * self.batch_size)
            items = streams[stream].take(place * self.batch_size, self.batch_size)
            yield self.collate([self.dataset.item(epoch, index, sample) for index, sample in items])
            step += workers

    def place(self, batch: int) -> tuple[int, int]:
        """The stream that batch `batch` of a pass comes from, and its number in the order of the pass.

        The batch that is read last is also the last in the order of the pass: the one that may be smaller.
        """
        length, longer = divmod(self.batches, self.streams)  # so many streams have one batch more
        stream, step = batch % self.streams, batch // self.streams
        stretch = (stream - longer) % self.streams  # the longer streams come first and read the last stretches
        return stream, stretch * length + max(0, stretch + longer - self.streams) + step


class _Stream:
    """The samples of a pass from a place on, of which some are passed over."""

    def __init__(self, dataset: ShardDataset, epoch: int, place: int):
        self.samples, self.place = dataset.read(epoch, place), place

    def take(self, place: int, number: int) -> list[tuple[int, Sample]]:
        """`number` samples from `place` on, which must not lie before the end of those taken; less at the end."""
        taken = list(islice(self.samples, place - self.place, place - self.place + number))
        self.place = place + number
        return taken
