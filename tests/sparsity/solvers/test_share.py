"""Layers that are shared out between ranks are those of one rank, to the bit."""

from threading import Thread

import pytest
import torch

import pruners
from sparsity.errors import UserError
from sparsity.run.request import Request
from sparsity.solvers.share import Share, check_same
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView
from tests.toys import Ranks


def on_ranks(number, call):
    """Return what `call(rank, reduce)` returns or raises on each of so many ranks."""
    found, reduce = [None] * number, Ranks(number)

    def run(rank):
        try:
            found[rank] = call(rank, reduce)
        except UserError as error:
            found[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def result(name):
    generator = torch.Generator().manual_seed(len(name))
    weight = torch.randn(3, 5, generator=generator)
    weight[0, 0] = -0.0
    extra = {"a": None, "bb": weight.half()}.get(name, weight.double())
    return weight > 0, extra, None


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_have_what_each_has_solved(ranks):
    names, solved = ["a", "bb", "ccc", "dddd"], []

    def call(rank, reduce):
        def solve(name):
            solved.append(name)
            return result(name)

        return Share(rank, ranks, reduce).solve(names, solve, 3)

    for found in on_ranks(ranks, call):
        assert list(found) == names
        for name, fields in found.items():
            for ours, theirs in zip(fields, result(name), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
                    assert torch.equal(torch.signbit(ours), torch.signbit(theirs))
    assert sorted(solved) == names, "each once, on one of them"


def test_an_error_of_one_is_raised_by_all():
    def solve(name):
        if name == "b":
            raise UserError("b is singular")
        return (torch.ones(1),)

    for found in on_ranks(3, lambda rank, reduce: Share(rank, 3, reduce).solve(["a", "b", "c"], solve, 1)):
        assert str(found) == "b is singular"


def test_different_masks_are_an_error_on_all_ranks():
    def call(digests):
        device = torch.device("cpu")
        return on_ranks(3, lambda rank, reduce: check_same("masks", digests[rank], reduce, 3, device))

    same, other = "ab" * 32, "ab" * 27 + "ad" + "ab" * 4
    assert call([same] * 3) == [None] * 3
    assert all("the ranks have chosen different masks" in str(error) for error in call([same, other, same]))


@pytest.mark.parametrize("pruner", ["wanda", "sparsegpt"])
def test_a_plan_on_two_ranks_prunes_as_one(pruner):
    def view():
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))).double().eval()
        return PrunableView(model, group_of=lambda key: "all", forward=model, blocks=[model[:2], model[2:]])

    batches = [torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    options = {"calibration_mode": "sequential"} if pruner == "wanda" else {"enable_update": True}
    views = [view() for _ in range(3)]

    def prune(view, reading):
        plan, request = pruners.build(pruner, **options), Request([0.5])
        ((_, masks),) = plan.masks(view, plan.measure(view, reading, request), request, lambda epoch: reading)
        return masks

    alone = prune(views[2], CalibrationPass(batches))

    def call(rank, reduce):
        reading = CalibrationPass(batches[rank::2], reduce=reduce, place=(rank, 2))
        return prune(views[rank], reading)

    one, two = on_ranks(2, call)
    assert one.digest() == two.digest() == alone.digest()
    for name in one.weights:
        assert torch.equal(one.weights[name], two.weights[name])
        torch.testing.assert_close(one.weights[name], alone.weights[name], rtol=1e-6, atol=1e-9)
