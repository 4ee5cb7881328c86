"""Calibration batches for pruning: general image-text pairs and regions, read in lockstep, whole batches to each rank."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datasets.bundled import BundledRegions, BundledScenes, load_glyphs
from datasets.collate import SkippedImages, collate, collate_regions
from datasets.loaders import loader
from datasets.pretraining import ImageTextDataset
from datasets.regions import RegionDataset
from datasets.sources import PruneConfig
from datasets.text import TextEncoder
from datasets.transforms import TrainTransform

log = logging.getLogger(__name__)


class Calibration:
    """At most `num_batches` batches of each source, one after the other; the shorter source ends the pass.

    Iterating reads this rank's share: batch b goes to rank b % world_size. `len` counts the batches of this rank.
    skipped_path: list of the images that cannot be read; other ranks than 0 write their own, beside it.
    """

    def __init__(
        self,
        config: PruneConfig,
        encode: TextEncoder,
        *,
        image_size: int,
        patch_size: int,
        num_batches: int,
        seed: int,
        skipped_path: Path,
        rank: int = 0,
        world_size: int = 1,
    ):
        sources = _bundled if config.bundled else _files
        self.sources = sources(config, encode, image_size, patch_size, seed, num_batches)
        self.batches = min(num_batches, *(max(1, len(data) // config.batch_size) for data, _ in self.sources))
        if self.batches < num_batches:
            log.info("the calibration data has %d batches, fewer than the %d asked for", self.batches, num_batches)
        self.config, self.seed, self.skipped_path = config, seed, rank_path(skipped_path, rank)
        self.rank, self.world_size = rank, world_size
        self.steps = len(range(rank, self.batches, world_size))

    def __len__(self) -> int:
        return self.steps * len(self.sources)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.config.batch_size
        skipped = SkippedImages(self.skipped_path, max(1, len(self) * size), self.config.max_skipped)
        loaders = [
            loader(
                data,
                min(size, len(data)),
                gather,
                seed=self.seed,
                stop=self.steps,
                rank=self.rank,
                world_size=self.world_size,
                workers=self.config.workers,
            )
            for data, gather in self.sources
        ]
        for batches in zip(*loaders, strict=True):
            yield from skipped.watch(batches)


def rank_path(path: Path, rank: int) -> Path:
    """`path` for rank 0, `stem_rank1.suffix` for rank 1: no file is written by two processes."""
    return path.with_stem(f"{path.stem}_rank{rank}") if rank else path


Source = tuple[Dataset, Callable[[list[Any]], dict[str, Any]]]


def _bundled(
    config: PruneConfig, encode: TextEncoder, side: int, patch: int, seed: int, num_batches: int
) -> list[Source]:
    glyphs, scenes = load_glyphs(), num_batches * config.batch_size
    return [
        (BundledScenes(glyphs, encode, scenes, side=side, seed=seed), collate),
        (BundledRegions(glyphs, encode, scenes, patch=patch, side=side, seed=seed + 1), collate_regions),
    ]


def _files(config: PruneConfig, encode: TextEncoder, side: int, patch: int, seed: int, _: int) -> list[Source]:
    general = [(f.annotations, f.images) for f in config.general]
    region = [(f.annotations, f.images) for f in config.region]
    sources: list[Source] = []
    if general:
        sources.append((ImageTextDataset(general, TrainTransform(side), encode, seed=seed), collate))
    if region:
        sources.append((RegionDataset(region, encode, side, patch, seed=seed + 1), collate_regions))
    return sources
