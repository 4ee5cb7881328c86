"""DataLoaders over running numbers: workers draw and decode, the order is a `ResumableSampler`'s."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datasets.place import ALONE, Place
from datasets.sampler import ResumableSampler


def loader(
    dataset: Dataset,
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    place: Place = ALONE,
    workers: int = 0,
    shuffle: bool = True,
) -> DataLoader:
    """Batches `start` to `stop` of this rank; see `ResumableSampler`. `workers` processes read them ahead."""
    sampler = ResumableSampler(
        len(dataset), seed=seed, batch_size=batch_size, shuffle=shuffle, start=start, stop=stop, place=place
    )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
