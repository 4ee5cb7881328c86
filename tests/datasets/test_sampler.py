from itertools import islice

import pytest

from datasets.place import Place
from datasets.sampler import ResumableSampler, sample_generator


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_every_sample_once(size, shuffle):
    numbers = list(ResumableSampler(size, seed=0, batch_size=4, shuffle=shuffle, stop=15))[: 5 * size]
    for epoch in range(5):
        held = numbers[epoch * size : (epoch + 1) * size]
        assert sorted(held) == list(range(epoch * size, (epoch + 1) * size))
        assert shuffle or held == sorted(held)


def test_epochs_and_seeds_have_their_own_order():
    first = list(islice(ResumableSampler(50, seed=0, batch_size=10), 100))
    assert [n - 50 for n in first[50:]] != first[:50]
    assert list(islice(ResumableSampler(50, seed=1, batch_size=10), 50)) != first[:50]
    assert list(islice(ResumableSampler(50, seed=0, batch_size=10), 100)) == first


@pytest.mark.parametrize("start", [0, 1, 7])
@pytest.mark.parametrize("world_size", [1, 3])
def test_resumes_at_any_batch(start, world_size):
    for rank in range(world_size):
        arguments = {"seed": 5, "batch_size": 4, "stop": 9, "place": Place(rank, world_size)}
        whole = ResumableSampler(11, **arguments)
        resumed = ResumableSampler(11, **arguments, start=start)
        assert list(resumed) == list(whole)[start * 4 :]
        assert len(list(resumed)) == len(resumed) == (9 - start) * 4


def test_ranks_take_turns_in_whole_batches():
    stream = list(ResumableSampler(11, seed=2, batch_size=4, stop=12))
    batches = [stream[i : i + 4] for i in range(0, len(stream), 4)]
    for rank in range(3):
        own = list(ResumableSampler(11, seed=2, batch_size=4, place=Place(rank, 3), stop=4))
        assert [own[i : i + 4] for i in range(0, 16, 4)] == batches[rank::3]


def test_endless_without_stop():
    sampler = ResumableSampler(2, seed=0, batch_size=3)
    assert len(list(islice(sampler, 1000))) == 1000
    with pytest.raises(TypeError):
        len(sampler)


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"size": 0}, "size"), ({"start": -1}, "start"), ({"stop": -1}, "stop")],
)
def test_bad_arguments_are_named(bad, named):
    with pytest.raises(ValueError, match=named):
        ResumableSampler(**{"size": 5, "seed": 0, "batch_size": 2, **bad})


def test_a_sample_draws_by_seed_epoch_and_index():
    def drawn(n, seed):
        index, rng = sample_generator(n, size=10, seed=seed)
        return index, rng.random()

    values = {drawn(n, seed) for n in (0, 3, 10, 13, 30) for seed in (0, 1)}
    assert len({value for _, value in values}) == 10
    assert drawn(13, 0) == drawn(13, 0) and drawn(13, 0)[0] == 3
    with pytest.raises(IndexError):
        sample_generator(-1, 10, 0)


def test_a_rank_is_one_of_those_that_there_are():
    with pytest.raises(ValueError, match="rank must be between 0 and world_size - 1 = 1, got 2"):
        Place(2, 2)
