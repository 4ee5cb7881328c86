"""The tenth that is held out: seeded, never trained on, the same for any number of ranks."""

from itertools import islice

import numpy as np
import pytest
import torch

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import LoaderBatches
from datasets.calibration.data_kinds import Lockstep
from datasets.calibration.held_out import Part, hold_out, places
from datasets.collate import collate
from datasets.pairs.shards import ShardDataset
from datasets.place import ALONE, Place
from sparsity.errors import UserError


class Numbers:
    """Items {"n": running number}, of `length` in an epoch."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        return {"n": torch.tensor(n)}


def lockstep(tmp_path, kinds, num_batches=99, place=ALONE):
    config = ExternalPruneConfig(batch_size=2)
    sources = [[(Numbers(length), collate) for length in kind] for kind in kinds]
    return Lockstep(sources, config, tmp_path, num_batches, 5, place)


def test_places_are_a_partition_that_depends_on_the_seed():
    rest, held = places(50, 3, "sample")
    assert len(held) == 5 and sorted([*rest, *held]) == list(range(50))
    assert (held == places(50, 3, "sample")[1]).all() and (held != places(50, 4, "sample")[1]).any()
    assert len(places(2, 0, "sample")[1]) == 1
    with pytest.raises(UserError, match="there is only one sample"):
        places(1, 0, "sample")


def test_a_part_has_the_running_numbers_of_its_samples():
    part = Part(Numbers(10), np.array([2, 7]))
    assert [int(part[n]["n"]) for n in range(4)] == [2, 7, 12, 17]


def test_no_sample_that_is_held_out_is_ever_read(tmp_path):
    rest, held = lockstep(tmp_path, [[40]]).split(5, 99)
    out = {int(n) for batch in held for n in batch["n"]}
    assert len(out) == held.samples == 4 and rest.samples == 36
    read = [int(n) for batch in islice(rest.stream(), 60) for n in batch["n"]]
    assert len(set(read)) == len(read), "each epoch draws anew"
    assert {n % 40 for n in read} == set(range(40)) - out


def test_most_limits_what_is_read_not_what_is_held_out(tmp_path):
    rest, held = lockstep(tmp_path, [[400], [400]]).split(5, 3)
    assert held.samples == 80 and len(list(held)) == 6 and held.batches_in_round == rest.batches_in_round == 2


def test_a_stream_is_entered_anywhere(tmp_path):
    rest, _ = lockstep(tmp_path, [[40], [60]], num_batches=10).split(5, 99)
    whole = [batch["n"].tolist() for batch in islice(rest.stream(), 50)]
    for start in (0, 3, 16, 17, 40):
        assert [batch["n"].tolist() for batch in islice(rest.stream(start), 50 - start)] == whole[start:]


@pytest.mark.parametrize("kinds", [[[70]], [[70], [90]]])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_in_turns_what_one_reads(tmp_path, kinds, ranks):
    one = lockstep(tmp_path, kinds).split(5, 99)
    several = [lockstep(tmp_path, kinds, place=Place(rank, ranks)).split(5, 99) for rank in range(ranks)]
    per_step = ranks * one[0].batches_in_round
    streams = [rest.stream() for rest, _ in several]
    alone = one[0].stream()
    for _ in range(30):  # steps
        expected = {tuple(batch["n"].tolist()) for batch in islice(alone, per_step)}
        found = [islice(stream, one[0].batches_in_round) for stream in streams]
        assert {tuple(batch["n"].tolist()) for own in found for batch in own} == expected
    held = [tuple(batch["n"].tolist()) for _, own in several for batch in own]
    assert sorted(held) == sorted(tuple(batch["n"].tolist()) for batch in one[1])


def twelve(seed):
    return [torch.tensor([i]) for i in range(12)]


def test_batches_of_a_function():
    rest, held = LoaderBatches(twelve, "f", 12, 0).split(5, 99)
    out = {int(batch) for batch in held}
    assert len(out) == 1 and rest.samples == 11
    read = [int(batch) for batch in islice(rest.stream(), 22)]
    assert read == [i for i in range(12) if i not in out] * 2
    assert [int(batch) for batch in islice(rest.stream(15), 7)] == read[15:]
    ranks = [LoaderBatches(twelve, "f", 12, 0, Place(rank, 2)).split(5, 99)[0].stream() for rank in (0, 1)]
    assert [int(next(ranks[i % 2])) for i in range(22)] == read


def test_a_function_that_ends_early_is_refused():
    passes = iter([twelve(0), twelve(0)[:3]])
    made = LoaderBatches(lambda: next(passes), "f", 12, 0)
    rest, _ = made.split(5, 99)
    with pytest.raises(UserError, match="ended after 3 batches"):
        list(islice(rest.stream(), 20))


def test_whole_shards_are_held_out(tmp_path):
    data = ShardDataset.__new__(ShardDataset)
    data.paths, data.counts = [f"{i}.tar" for i in range(20)], np.arange(1, 21)
    rest, held = hold_out(data, 0)
    assert sorted(rest.paths + held.paths) == sorted(data.paths) and len(held.paths) == 2
    assert len(rest) + len(held) == len(data)
    assert rest.first.tolist() == [0, *np.cumsum(rest.counts)[:-1].tolist()]
