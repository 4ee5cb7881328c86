"""Image-text pairs to learn the language of captions from: annotated files and WebDataset shards, or bundled scenes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from configs.finetuning import CaptioningPretrainConfig
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledScenes
from datasets.loaders import loader
from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.shards import ShardDataset, shard_loader
from datasets.text import TextEncoder
from datasets.transforms import TrainTransform


class Pairs:
    """Data for `read`: samples that are indexed by running numbers, and shards; either may be None, not both."""

    def __init__(self, indexed: Dataset | None, shards: ShardDataset | None):
        self.indexed, self.shards = indexed, shards

    def __len__(self) -> int:
        """Samples in an epoch."""
        return sum(len(part) for part in (self.indexed, self.shards) if part is not None)

    def indexed_batches(self, batches: int) -> int:
        """How many of the first `batches` of a rank are of `indexed`: in proportion to what there is."""
        return batches * (0 if self.indexed is None else len(self.indexed)) // len(self)


def read(
    pairs: Pairs,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    seed: int,
    start: int,
    stop: int,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Batches `start` to `stop` of this rank, each of one source; as `datasets.loaders.loader`, which takes the
    options. The shards' order is that of their own seed.
    """
    first, last = pairs.indexed_batches(start), pairs.indexed_batches(stop)
    indexed = shards = iter(())
    if last > first:
        indexed = iter(loader(pairs.indexed, batch_size, collate, seed=seed, start=first, stop=last, **options))
    if stop - last > start - first:
        streamed = {"start": start - first, "stop": stop - last, **options}
        shards = iter(shard_loader(pairs.shards, batch_size, collate, **streamed))
    for batch in range(start, stop):
        yield next(indexed if pairs.indexed_batches(batch + 1) > pairs.indexed_batches(batch) else shards)


def training_set(config: CaptioningPretrainConfig, encode: TextEncoder, side: int, seed: int) -> Pairs:
    """Return the data that the configuration trains on, images of `side` pixels."""
    fields = partial(encode, masked=False)
    if config.bundled:
        scenes = BundledScenes(load_glyphs(), fields, config.bundled.train_scenes, side=side, seed=seed)
        return Pairs(scenes, None)
    annotated = [(files.annotations, files.images) for files in config.train if files.annotations]
    shards = [files.images for files in config.train if not files.annotations]
    transform, reading = TrainTransform(side), {"seed": seed, "decoding": config.decoding}
    return Pairs(
        ImageTextDataset(annotated, transform, fields, **reading) if annotated else None,
        ShardDataset(shards, transform, fields, streams=config.streams, **reading) if shards else None,
    )
