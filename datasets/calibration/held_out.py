"""A tenth of the samples of a dataset, on which nothing is trained."""

import copy
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datasets.pairs.shards import ShardDataset
from sparsity.errors import UserError

SHARE = 0.1


class Part(Dataset):
    """Some samples of a dataset that is indexed by running numbers, indexed in the same way.

    places: of the samples, each from 0 to len(data) - 1.
    """

    def __init__(self, data: Any, places: np.ndarray):
        self.data, self.places = data, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int) -> Any:
        epoch, place = divmod(n, len(self))
        return self.data[epoch * len(self.data) + int(self.places[place])]


def hold_out(data: Any, seed: int) -> tuple[Any, Any]:
    """Return a dataset without a tenth of its samples, and that tenth; of shards, whole shards.

    UserError where there are too few for both.
    """
    if isinstance(data, ShardDataset):
        rest, held = places(len(data.paths), seed, "shard of image-text pairs")
        return _of_shards(data, rest), _of_shards(data, held)
    rest, held = places(len(data), seed, "sample")
    return Part(data, rest), Part(data, held)


def places(number: int, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `number` are read, and which tenth, at least one, is held out: both in ascending order.

    what: they are, in the UserError where there is only one.
    """
    if number < 2:
        raise UserError(f"recovery holds out a tenth of the calibration data, and there is only one {what}: give more")
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,))).permutation(number)
    count = max(1, round(SHARE * number))
    return np.sort(order[count:]), np.sort(order[:count])


def _of_shards(data: ShardDataset, chosen: np.ndarray) -> ShardDataset:
    part = copy.copy(data)
    part.paths, part.counts = [data.paths[i] for i in chosen], data.counts[chosen]
    part.first = np.cumsum(part.counts) - part.counts
    return part
