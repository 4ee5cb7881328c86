"""Mean gradients over several ranks: those of one, with the same errors."""

import threading

import pytest
import torch
from torch import nn

from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView
from tests.processes import PATIENCE


class Ranks:
    """Threads that add up tensors as ranks do."""

    def __init__(self, number):
        self.barrier, self.given = threading.Barrier(number, timeout=PATIENCE), {}

    def reduce(self, rank, tensor):
        self.given[rank] = tensor
        self.barrier.wait()
        total = torch.stack([self.given[rank] for rank in sorted(self.given)]).sum(0)
        self.barrier.wait()
        return total


def on_ranks(view_of, shares, statistic="mean_gradient"):
    """Return what each rank gets for its batches, or the message of its error."""
    ranks, results = Ranks(len(shares)), {}

    def work(rank, batches):
        try:
            results[rank] = collect(view_of(), statistic, batches, reduce=lambda tensor: ranks.reduce(rank, tensor))
        except ValueError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(len(shares))]


def view_of():
    """Two layers; a batch says which of them its loss goes through."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)}).double()
    for number, weight in enumerate(model.parameters()):
        weight.data = torch.arange(6.0, dtype=torch.float64).view(2, 3) + number

    def loss(batch, generator=None):
        names, x = batch
        return sum(model[name](x).square().sum() for name in names)

    return PrunableView(model, group_of=lambda name: "all", loss=loss)


def batches(*names):
    generator = torch.Generator().manual_seed(1)
    return [(n, torch.randn(4, 3, dtype=torch.float64, generator=generator)) for n in names]


@pytest.mark.parametrize("names", [("ab", "ab", "ab"), ("a", "b", "a"), ("ab", "a", "b")])
@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("statistic", ["mean_gradient", "squared_gradient"])
def test_ranks_get_what_one_gets(names, number, statistic):
    """Also where a layer gets its gradient on one rank only, and a rank has no batch."""
    given = batches(*names)
    alone = collect(view_of(), statistic, given)
    for result in on_ranks(view_of, [given[rank::number] for rank in range(number)], statistic):
        for name, gradient in alone.items():
            torch.testing.assert_close(result[name], gradient)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_layer_without_gradient_is_an_error_on_every_rank(number):
    given = batches("b", "b")
    with pytest.raises(ValueError) as alone:
        mean_gradients(view_of(), given)
    assert "layer 'a.weight' got no gradient from the loss" in str(alone.value)
    assert on_ranks(view_of, [given[rank::number] for rank in range(number)]) == [str(alone.value)] * number


def test_no_batch_on_any_rank():
    assert on_ranks(view_of, [[], []]) == ["there are no calibration batches"] * 2
