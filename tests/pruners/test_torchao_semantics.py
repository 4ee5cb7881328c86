"""Expectations of the public tests of torchao's WandaSparsifier, for our pruner: weights that the eye can check."""

import torch
from torch import Tensor, nn

import pruners
from sparsity.run.generic import generic_view
from sparsity.view import PrunableView


def linear(*rows: tuple[float, ...]) -> nn.Sequential:
    """One linear layer with these rows as its weight."""
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows)))
    model[0].weight.data = torch.tensor(rows)
    return model


def left(model: nn.Module, inputs: Tensor, **options) -> list[list[float]]:
    """Return what wanda leaves of the weight of the first layer, calibrated on these inputs."""
    pruners.prune(model, "wanda", data=[inputs], **options).apply(generic_view(model))
    return model[0].weight.tolist()


def test_two_of_four_are_the_larger_ones_where_inputs_are_alike():
    model = linear((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0))
    assert left(model, torch.ones(1, 8), pattern="2:4") == [[0, 0, 3, 4, 0, 0, 7, 8]]


def test_norms_of_inputs_outweigh_the_weights():
    """Scores are 100, 20, 3 and 0.4: the smallest weights stay."""
    model = linear((1.0, 2.0, 3.0, 4.0))
    assert left(model, torch.tensor([[100.0, 10.0, 1.0, 0.1]]), sparsity=0.5) == [[1, 2, 0, 0]]


def test_norms_decide_within_each_group_of_four():
    model = linear((1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0))
    inputs = torch.tensor([[100.0, 10.0, 1.0, 0.1, 0.1, 1.0, 10.0, 100.0]])
    assert left(model, inputs, pattern="2:4") == [[1, 2, 0, 0, 0, 0, 3, 4]]


def test_norms_are_of_all_batches_together():
    """Norms are (5, 4): the second batch has nothing in the second input. Alone, each batch would decide otherwise."""
    model, batches = linear((3.0, 3.5)), [torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 0.0]])]
    masks = pruners.prune(model, "wanda", sparsity=0.5, data=batches)
    assert masks["0.weight"].tolist() == [[True, False]]
    assert pruners.prune(model, "wanda", sparsity=0.5, data=batches[:1])["0.weight"].tolist() == [[False, True]]


def test_weights_compete_within_rows_or_as_there_within_the_layer():
    rows = ((1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0))
    assert left(linear(*rows), torch.ones(1, 4), sparsity=0.5) == [[0, 0, 3, 4], [0, 0, 30, 40]]
    assert left(linear(*rows), torch.ones(1, 4), sparsity=0.5, scope="layer") == [[0, 0, 0, 0], [10, 20, 30, 40]]


def two_layers() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 200), nn.ReLU(), nn.Linear(200, 10))
    return model, [torch.randn(100, 128), torch.randn(50, 128)]


def test_each_layer_loses_half_whatever_its_size_and_the_batches():
    model, batches = two_layers()
    for scope in ("row", "layer"):
        masks = pruners.prune(model, "wanda", sparsity=0.5, scope=scope, data=batches)
        assert [int(mask.sum()) for mask in masks.values()] == [128 * 100, 200 * 5]


def test_a_layer_that_is_not_named_stays_dense():
    model, batches = two_layers()
    view = PrunableView(model, group_of=lambda key: "model", keep_dense=["2"], forward=model)
    masks = pruners.prune(view, "wanda", sparsity=0.5, data=batches)
    masks.apply(view)
    assert list(masks) == ["0.weight"]
    assert int((model[0].weight == 0).sum()) == 128 * 100
    assert bool((model[2].weight != 0).all())


def test_pruned_weights_are_plain_ones():
    """There is nothing to squash: no parametrisation, no mask buffer, the keys of before."""
    model, batches = two_layers()
    keys = list(model.state_dict())
    pruners.prune(model, "wanda", sparsity=0.5, data=batches).apply(generic_view(model))
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert not model[0]._forward_hooks
