"""Two ranks accept and refuse what one does, with the same words: in threads, and in processes of gloo."""

from functools import partial
from threading import Thread

import pytest
import torch
from torch import multiprocessing

from sparsity.learned.scores import learn, start_from_magnitude
from sparsity.statistics.gradient_rows import Scratch, gradient_rows
from sparsity.statistics.passes import collect
from tests.sparsity.learned.choices import choice
from tests.toys import Ranks, layers, view_of

pytestmark = pytest.mark.script  # long: left out of make test-fast

IDLE = "layers 'c.weight', 'd.weight' got no gradient from the loss; keep them dense (keep_dense, --exclude)"
UNSEEN = "layers 'c.weight', 'd.weight' saw no calibration sample; keep them dense (keep_dense, --exclude)"


def view_on(names):
    """Four layers, those of `names` prunable; a batch says which of them read it."""
    model = layers(*[(4, 4)] * 4)  # "a" to "d"; nothing here draws from the global state, which threads share

    def loss(batch, generator=None):
        return sum(model[name](batch[0]).square().mean() for name in batch[1])

    dense = [name for name in "abcd" if name not in names]
    return view_of(model, keep_dense=dense, loss=loss, forward=loss)


def batches_of(*reached):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 4, generator=generator), names) for names in reached]


def norms(view, batches, rounds, reduce=None):
    return collect(view, ["input_norms", "hessian"], batches, reduce=reduce)["hessian"]


def gradients(view, batches, rounds, reduce=None):
    return collect(view, "mean_gradient", batches, reduce=reduce)


def rows(view, batches, rounds, reduce=None):
    found = gradient_rows(view, batches, rounds=rounds, budget=10**9, reduce=reduce)
    return {"rows": found.read(0, found.width), "sum": found.sum()}


def learned(view, batches, rounds, reduce=None):
    scores, choose = start_from_magnitude(view, "0.5"), choice(view, "0.5")
    return learn(view, scores, choose, batches, rounds=rounds, lr=0.02, weight_decay=0.01, reduce=reduce)


MEASURED = {"norms": norms, "gradients": gradients, "rows": rows, "learned": learned}


def outcome(measure, names, batches, rounds, reduce=None):
    """Return what is measured, or the message of the error."""
    try:
        return MEASURED[measure](view_on(names), batches, rounds, reduce)
    except ValueError as error:
        return str(error)


def shares_of(batches):
    """For each of two ranks, its batches and rounds: every second one."""
    return [(batches[rank::2], [int(i % 2 == rank) for i in range(len(batches))]) for rank in range(2)]


def in_threads(measure, names, batches):
    reduce, results = Ranks(2), {}

    def work(rank, share):
        results[rank] = outcome(measure, names, *share, reduce)

    threads = [Thread(target=work, args=item) for item in enumerate(shares_of(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(2)]


def same(found, expected):
    if isinstance(expected, str):
        return found == expected
    return all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


@pytest.mark.parametrize("measure", MEASURED)
@pytest.mark.parametrize("reached", [("ab", "ab", "a"), ("a", "b", "a"), ("a",), ()])
@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_two_ranks_are_as_one(monkeypatch, measure, reached, names):
    monkeypatch.setattr("sparsity.learned.scores._seeded", lambda *_: torch.enable_grad())  # threads share its state
    batches = batches_of(*reached)
    alone = outcome(measure, names, batches, [1] * len(batches))
    if names == "abcd" and "b" in "".join(reached):
        assert alone == (UNSEEN if measure == "norms" else IDLE)
    else:
        assert isinstance(alone, str) == (len(reached) < 2)
    for found in in_threads(measure, names, batches):
        assert same(found, alone)


def one_rank(rank, address, folder):
    """In a process: every measure, accepted and refused."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)

    def reduce(tensor):
        torch.distributed.all_reduce(tensor)  # in place, as of Fabric
        return tensor

    share = shares_of(batches_of("ab", "a", "ab"))[rank]
    found = {
        (measure, names): outcome(measure, names, *share, reduce) for measure in MEASURED for names in ("ab", "abcd")
    }
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_are_as_one(tmp_path):
    multiprocessing.spawn(one_rank, (f"file://{tmp_path}/store", str(tmp_path)), nprocs=2)
    batches = batches_of("ab", "a", "ab")
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        for (measure, names), what in found.items():
            assert same(what, outcome(measure, names, batches, [1] * 3)), (measure, names)


@pytest.mark.parametrize("measure", ["rows", "learned"])
def test_data_that_ends_early_is_used_and_said(caplog, measure):
    batches = batches_of("ab", "ab", "ab", "ab", "ab")
    ended = partial(outcome, measure, "ab", iter(batches))
    if measure == "rows":  # the last round is the mean of what came of it, and the round of nothing is no row
        expected = outcome(measure, "ab", batches, [2, 2, 1])
        assert torch.equal(ended([2, 2, 2, 2])["rows"], expected["rows"])
    else:
        found = ended([2, 2, 2, 2])
        assert all(score.isfinite().all() for score in found.values())
    assert "5 of 8 batches came" in caplog.text


@pytest.mark.parametrize("measure", ["gradients", "rows", "learned"])
def test_gradients_that_are_not_finite_are_all_named(measure):
    ((batch, names),) = batches_of("ab")
    message = "the gradient of layer 'a.weight' holds NaN or Inf (also of b.weight)"
    assert outcome(measure, "ab", [(batch * float("nan"), names)], [1]) == message


@pytest.mark.parametrize("measure", ["gradients", "rows", "learned"])
def test_the_first_batch_warns_of_layers_without_gradient(caplog, measure):
    first, second = batches_of("ab", "abcd")

    def batches():
        yield first
        yield second
        assert "layers 'c.weight', 'd.weight' got no gradient from the loss in the first batch" in caplog.text

    assert not isinstance(outcome(measure, "abcd", batches(), [1, 1]), str)


def test_a_resumed_run_knows_which_layers_had_gradients(tmp_path):
    given = batches_of("abcd", "ab")
    kept = {"rounds": [1, 1], "budget": 0, "scratch": Scratch(tmp_path / "g", "data")}

    def broken():
        yield given[0]
        raise KeyboardInterrupt

    view = view_on("abcd")
    with pytest.raises(KeyboardInterrupt):
        gradient_rows(view, broken(), **kept)
    found = gradient_rows(view, iter(given), **kept)
    assert torch.equal(found.read(0, found.width), rows(view, given, [1, 1])["rows"])
