"""Calibration batches for pruning: general image-text pairs and regions, in lockstep, whole batches to each rank."""

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datasets.bundled import BundledRegions, BundledScenes, load_glyphs
from datasets.collate import SkippedImages, collate, collate_regions
from datasets.loaders import loader
from datasets.pretraining import ImageTextDataset
from datasets.regions import RegionDataset
from datasets.shards import ShardDataset, shard_loader
from datasets.sources import PruneConfig
from datasets.text import TextEncoder
from datasets.transforms import TrainTransform

log = logging.getLogger(__name__)


class Calibration:
    """At most `num_batches` general and as many region batches, in turns; the shorter of the two ends the pass.

    General batches come from annotated images and from shards, in proportion to what there is of them. Iterating reads
    this rank's share: batch b of a source goes to rank b % world_size. `len` counts the batches of this rank, `numbers`
    are their places in the order of one rank alone. `at(epoch)` has fresh batches.

    Args:
        vision: has `image_size` and `patch_size`, in pixels.
        folder: where the images that cannot be read are listed.
    """

    def __init__(
        self,
        config: PruneConfig,
        encode: TextEncoder,
        vision: Any,
        folder: Path,
        num_batches: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ):
        sources = _bundled if config.bundled else _files
        kinds = sources(config, encode, vision.image_size, vision.patch_size, seed, num_batches)
        available = [max(1, sum(len(data) // config.batch_size for data, _ in kind)) for kind in kinds]
        self.batches = min(num_batches, *available)
        if self.batches < num_batches:
            log.info("the calibration data has %d batches, fewer than the %d asked for", self.batches, num_batches)
        self.config, self.seed, self.skipped_path = config, seed, skipped_path(folder, rank)
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self.sources = [source for kind in kinds for source in kind]
        self.shares = [n for kind in kinds for n in proportional(self.batches, [len(data) for data, _ in kind])]

    def at(self, epoch: int) -> "Calibration":
        """The same data with the batches that follow those of the epochs before; this one is epoch 0."""
        later = copy.copy(self)
        later.epoch = epoch
        return later

    @property
    def numbers(self) -> list[int]:
        return [number for number, _, _ in self._turns()]

    def __len__(self) -> int:
        return len(self._turns())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turns = self._turns()
        expected = max(1, len(turns) * self.config.batch_size)
        skipped = SkippedImages(self.skipped_path, expected, self.config.max_skipped)
        steps = {i: [batch // self.world_size for _, j, batch in turns if j == i] for _, i, _ in turns}
        loaders = {i: iter(self._loader(*self.sources[i], mine[0], mine[-1] + 1)) for i, mine in steps.items()}
        yield from skipped.watch(next(loaders[i]) for _, i, _ in turns)

    def _turns(self) -> list[tuple[int, int, int]]:
        """(number, source, batch of the source) of this rank's batches, in the order in which they are read."""
        order = sorted(((b + 0.5) / share, i, b) for i, share in enumerate(self.shares) for b in range(share))
        first = self.epoch * len(order)
        turns = ((first + n, i, self.epoch * self.shares[i] + b) for n, (_, i, b) in enumerate(order))
        return [turn for turn in turns if turn[2] % self.world_size == self.rank]

    def _loader(self, data: Any, gather: Callable[[list[Any]], dict[str, Any]], start: int, stop: int) -> DataLoader:
        options = {"start": start, "stop": stop, "rank": self.rank, "world_size": self.world_size}
        options |= {"workers": self.config.workers}
        size = min(self.config.batch_size, len(data))
        if isinstance(data, ShardDataset):
            return shard_loader(data, size, gather, **options)
        return loader(data, size, gather, seed=self.seed, **options)


def proportional(total: int, sizes: list[int]) -> list[int]:
    """`total` as a sum of whole numbers in proportion to `sizes`, by largest remainders."""
    shares = [total * size // sum(sizes) for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % sum(sizes)))[: total - sum(shares)]:
        shares[i] += 1
    return shares


def skipped_path(folder: Path, rank: int) -> Path:
    """List of unreadable images in a folder of results; each rank has its own."""
    return folder / (f"skipped_rank{rank}.txt" if rank else "skipped.txt")


Source = tuple[Dataset | ShardDataset, Callable[[list[Any]], dict[str, Any]]]


def _bundled(
    config: PruneConfig, encode: TextEncoder, side: int, patch: int, seed: int, num_batches: int
) -> list[list[Source]]:
    glyphs, scenes = load_glyphs(), num_batches * config.batch_size
    return [
        [(BundledScenes(glyphs, encode, scenes, side=side, seed=seed), collate)],
        [(BundledRegions(glyphs, encode, scenes, patch=patch, side=side, seed=seed + 1), collate_regions)],
    ]


def _files(config: PruneConfig, encode: TextEncoder, side: int, patch: int, seed: int, _: int) -> list[list[Source]]:
    annotated = [(f.annotations, f.images) for f in config.general if f.annotations]
    shards = [f.images for f in config.general if not f.annotations]
    region = [(f.annotations, f.images) for f in config.region]
    general: list[Source] = []
    if annotated:
        general.append((ImageTextDataset(annotated, TrainTransform(side), encode, seed=seed), collate))
    if shards:
        general.append((ShardDataset(shards, TrainTransform(side), encode, seed=seed), collate))
    kinds = [general] if general else []
    if region:
        kinds.append([(RegionDataset(region, encode, side, patch, seed=seed + 1), collate_regions)])
    return kinds
