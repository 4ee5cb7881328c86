"""Calibration batches for pruning: image-text pairs and regions in lockstep, labelled images, or samples with noise;
whole batches to each rank.
"""

import copy
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from configs.pruning import LabelsPruneConfig, NoisePruneConfig, PruneConfig, PrunedModel
from configs.sources import Files
from datasets.bundled.classification import BundledClassification
from datasets.bundled.generation import Noised
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRegions, BundledScenes
from datasets.calibration.held_out import hold_out
from datasets.collate import SkippedImages, collate, collate_regions
from datasets.labelled.public import check_classes, labelled
from datasets.loaders import loader
from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.regions import RegionDataset
from datasets.pairs.shards import ShardDataset, shard_loader
from datasets.place import ALONE, Place
from datasets.text import TextEncoder
from datasets.transforms import IMAGENET, TrainTransform

log = logging.getLogger(__name__)

ALIGNED = 8  # rounds


class Lockstep:
    """At most `num_batches` batches of each kind of data, in turns; the shortest of them ends the pass.

    A kind is a list of sources, read in proportion to what there is of them. Iterating reads this rank's share: batch b
    of a source goes to rank b % world_size. `len` counts the batches of this rank, `numbers` are their places in the
    order of one rank alone. A batch of each kind is a round, and `rounds` says how many batches of each round this rank
    reads. `at(epoch)` has fresh batches.

    Args:
        config: has `batch_size`, `workers` and `max_skipped`.
        folder: where the images that cannot be read are listed.
    """

    unit = "samples"
    told = ""  # what is read, where it is the user's own

    def __init__(
        self,
        kinds: Sequence[Sequence["Source"]],
        config: PrunedModel,
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
    ):
        self.config, self.seed, self.skipped_path = config, seed, skipped_path(folder, place.rank)
        self.place, self.epoch, self.passed = place, 0, 0
        self._read(kinds, num_batches)
        if self.batches < num_batches:
            log.info("the calibration data has %d batches, fewer than the %d asked for", self.batches, num_batches)

    def _read(self, kinds: Sequence[Sequence["Source"]], num_batches: int) -> None:
        """Set what is read: at most `num_batches` batches of each kind an epoch."""
        size = self.config.batch_size
        available = [max(1, sum(len(data) // size for data, _ in kind)) for kind in kinds]
        self.kinds, self.batches = kinds, min(num_batches, *available)
        self.sources = [source for kind in kinds for source in kind]
        self.shares = [n for kind in kinds for n in proportional(self.batches, [len(data) for data, _ in kind])]

    def split(self, seed: int, most: int) -> tuple["Lockstep", "Lockstep"]:
        """Return the data without a tenth of its samples, and that tenth, of which at most `most` batches of each kind
        are read. Which samples these are depends on the seed alone.

        An epoch of the first has a multiple of `ALIGNED` rounds where it has as many: then as many ranks as divide that
        read in turns what one rank reads.
        """
        parts = [[(*hold_out(data, seed), gather) for data, gather in kind] for kind in self.kinds]
        rest, held = copy.copy(self), copy.copy(self)
        kinds = [[(kept, gather) for kept, _, gather in kind] for kind in parts]
        rest._read(kinds, self.batches)
        if rest.batches > ALIGNED:
            rest._read(kinds, rest.batches - rest.batches % ALIGNED)
        held._read([[(tenth, gather) for _, tenth, gather in kind] for kind in parts], most)
        return rest, held

    @property
    def samples(self) -> int:
        """The samples of the sources, whether they are read or not."""
        return sum(len(data) for data, _ in self.sources)

    @property
    def batches_in_round(self) -> int:
        """The batches of a round, on all ranks."""
        return sum(self.shares) // self.batches

    def stream(self, start: int = 0) -> Iterator[Any]:
        """Yield this rank's batches epoch after epoch, without end and without the first `start`."""
        for epoch in itertools.count(self.epoch):
            own = self.at(epoch)
            own.passed = min(start, len(own))
            start -= own.passed
            if own.passed < len(own):
                yield from own

    def at(self, epoch: int) -> "Lockstep":
        """The same data with the batches that follow those of the epochs before; this one is epoch 0."""
        later = copy.copy(self)
        later.epoch = epoch
        return later

    @property
    def numbers(self) -> list[int]:
        return [number for number, _, _ in self._turns()]

    @property
    def rounds(self) -> list[int]:
        own = Counter(number // self.batches_in_round - self.epoch * self.batches for number in self.numbers)
        return [own[i] for i in range(self.batches)]

    def __len__(self) -> int:
        return len(self._turns())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        turns = self._turns()[self.passed :]
        expected = max(1, len(turns) * self.config.batch_size)
        skipped = SkippedImages(self.skipped_path, expected, self.config.max_skipped)
        steps = {i: [batch // self.place.world_size for _, j, batch in turns if j == i] for _, i, _ in turns}
        loaders = {i: iter(self._loader(*self.sources[i], mine[0], mine[-1] + 1)) for i, mine in steps.items()}
        yield from skipped.watch(next(loaders[i]) for _, i, _ in turns)

    def _turns(self) -> list[tuple[int, int, int]]:
        """(number, source, batch of the source) of this rank's batches, in the order in which they are read."""
        order = sorted(((b + 0.5) / share, i, b) for i, share in enumerate(self.shares) for b in range(share))
        first = self.epoch * len(order)
        turns = ((first + n, i, self.epoch * self.shares[i] + b) for n, (_, i, b) in enumerate(order))
        return [turn for turn in turns if self.place.has(turn[2])]

    def _loader(self, data: Any, gather: Callable[[list[Any]], dict[str, Any]], start: int, stop: int) -> DataLoader:
        options = {"start": start, "stop": stop, "place": self.place, "workers": self.config.workers}
        size = min(self.config.batch_size, len(data))
        if isinstance(data, ShardDataset):
            return shard_loader(data, size, gather, **options)
        return loader(data, size, gather, seed=self.seed, **options)


class Calibration(Lockstep):
    """General image-text pairs and, in turns with them, regions; see `Lockstep`.

    Args:
        vision: has `image_size` and `patch_size`, in pixels.
        regions: the second source has regions of images; else it has image-text pairs, too.
    """

    def __init__(
        self,
        config: PruneConfig,
        encode: TextEncoder,
        vision: Any,
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
        *,
        regions: bool = True,
    ):
        kinds = [_general(config, encode, vision, seed, num_batches)]
        kinds.append((_region if regions else _in_domain)(config, encode, vision, seed + 1, num_batches))
        super().__init__([kind for kind in kinds if kind], config, folder, num_batches, seed, place)


class LabelsCalibration(Lockstep):
    """Labelled images; see `Lockstep`.

    Args:
        sizes: of the model; has `image_size`, in pixels, and `classes`.

    Raises:
        UserError: the data has other classes than the model.
    """

    def __init__(
        self, config: LabelsPruneConfig, sizes: Any, folder: Path, num_batches: int, seed: int, place: Place = ALONE
    ):
        if config.bundled:
            glyphs = load_glyphs()
            times = math.ceil(num_batches * config.batch_size / len(glyphs))  # whole rounds of the concepts, shuffled
            data = BundledClassification(glyphs, "train", times * len(glyphs), side=sizes.image_size, seed=seed)
        else:
            data = labelled(
                config.images,
                TrainTransform(sizes.image_size, statistics=IMAGENET),
                seed=seed,
                decoding=config.decoding,
            )
        check_classes(len(data.class_names), sizes.classes)
        super().__init__([[(data, collate)]], config, folder, num_batches, seed, place)


class NoiseCalibration(Lockstep):
    """Samples with noise, and their classes; see `Lockstep`.

    Args:
        data: items {"image", "label"}, read again with other noise where there are fewer than are asked for.
        sizes: of the model; has `null_class` and `class_dropout`.
    """

    def __init__(
        self,
        config: NoisePruneConfig,
        data: Dataset,
        sizes: Any,
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
    ):
        dropped = {"null_class": sizes.null_class, "dropout": sizes.class_dropout}
        noised = Noised(data, length=num_batches * config.batch_size, seed=seed, **dropped)
        super().__init__([[(noised, collate)]], config, folder, num_batches, seed, place)


def proportional(total: int, sizes: list[int]) -> list[int]:
    """`total` as a sum of whole numbers in proportion to `sizes`, by largest remainders."""
    shares = [total * size // sum(sizes) for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % sum(sizes)))[: total - sum(shares)]:
        shares[i] += 1
    return shares


def skipped_path(folder: Path, rank: int) -> Path:
    """List of unreadable images in a folder of results; each rank has its own."""
    return folder / (f"skipped_rank{rank}.txt" if rank else "skipped.txt")


def clear_skipped(folder: Path, place: Place) -> None:
    """Remove the lists that earlier runs left in a folder of results: a fresh run begins its own. Every rank calls it,
    before it reads anything; a list that another rank of this run may write is left to that rank, and one of a
    calibration that goes on from the rows in its files is kept.
    """
    if any(folder.glob(f"*_rank{place.rank}.rows")):  # as sparsity.statistics.gradient_rows keeps them
        return
    skipped_path(folder, place.rank).unlink(missing_ok=True)
    ours = {skipped_path(folder, other) for other in range(place.world_size)}
    for path in set(folder.glob("skipped_rank*.txt")) - ours if not place.rank else ():
        path.unlink(missing_ok=True)


Source = tuple[Dataset | ShardDataset, Callable[[list[Any]], dict[str, Any]]]


def _general(config: PruneConfig, encode: TextEncoder, vision: Any, seed: int, num_batches: int) -> list[Source]:
    return _pairs(config, config.general, encode, vision, seed, num_batches)


def _in_domain(config: PruneConfig, encode: TextEncoder, vision: Any, seed: int, num_batches: int) -> list[Source]:
    return _pairs(config, config.region, encode, vision, seed, num_batches)


def _region(config: PruneConfig, encode: TextEncoder, vision: Any, seed: int, num_batches: int) -> list[Source]:
    side, patch = vision.image_size, vision.patch_size
    if config.bundled:
        scenes = num_batches * config.batch_size
        return [(BundledRegions(load_glyphs(), encode, scenes, patch=patch, side=side, seed=seed), collate_regions)]
    annotated = [(files.annotations, files.folders) for files in config.region]
    reading = {"seed": seed, "decoding": config.decoding}
    return [(RegionDataset(annotated, encode, side, patch, **reading), collate_regions)] if annotated else []


def _pairs(
    config: PruneConfig, files: Sequence[Files], encode: TextEncoder, vision: Any, seed: int, num_batches: int
) -> list[Source]:
    """Bundled scenes, or the annotated images of these files and what is in their shards."""
    side = vision.image_size
    if config.bundled:
        scenes = num_batches * config.batch_size
        return [(BundledScenes(load_glyphs(), encode, scenes, side=side, seed=seed), collate)]
    annotated = [(each.annotations, each.folders) for each in files if each.annotations]
    shards = [each.images for each in files if not each.annotations]
    reading = {"seed": seed, "decoding": config.decoding}
    sources: list[Source] = []
    if annotated:
        sources.append((ImageTextDataset(annotated, TrainTransform(side), encode, **reading), collate))
    if shards:
        pairs = ShardDataset(shards, TrainTransform(side), encode, streams=config.streams, **reading)
        sources.append((pairs, collate))
    return sources
