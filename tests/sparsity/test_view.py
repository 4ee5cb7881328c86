"""Which weights are prunable, under which names, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsity.errors import UserError
from sparsity.view import canonical
from tests.toys import Attention, Conv1D, layers, view_of


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("module.layer.weight", "layer.weight"),
        ("_forward_module.module._orig_mod.layer.weight", "layer.weight"),
        ("encoder._orig_mod.layer.weight", "encoder.layer.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("my_module.weight", "my_module.weight"),
    ],
)
def test_wrapper_prefixes_are_stripped(key, expected):
    assert canonical(key) == expected


def test_order_is_the_models_and_names_are_its_state_dict_keys():
    model = Attention()
    before = list(model.state_dict())
    view = view_of(model, keep_dense=["head"])
    assert list(view.weights) == ["q.weight", "k.weight", "v.weight", "up.weight", "down.weight"]
    assert list(model.state_dict()) == before
    assert view.dense == ("head.weight",)
    assert view.numel == 3 * 64 + 2 * 128


def test_a_tied_weight_is_one_layer_with_all_its_names_and_modules():
    model = Attention()
    model.add_module("more", nn.Sequential(model.q))  # the same module under a second name
    view = view_of(model)
    tied, shared = view.weights["up.weight"], view.weights["q.weight"]
    assert tied.aliases == tied.uses == ("up.weight", "again.weight")
    assert tied.modules == (model.up, model.again)
    assert shared.aliases == ("q.weight", "more.0.weight")
    assert shared.modules == (model.q,)
    assert "again.weight" not in view.weights


def test_a_weight_tied_to_an_embedding_or_to_a_dense_layer_stays_dense():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "decoder": nn.Linear(4, 7)})
    model["decoder"].weight = model["embedding"].weight
    model["body"], model["head"] = nn.Linear(4, 4), nn.Linear(4, 4)
    model["twin"] = nn.Linear(4, 4)
    model["twin"].weight = model["head"].weight
    view = view_of(model, keep_dense=["head"])
    assert list(view.weights) == ["body.weight"]
    assert set(view.dense) == {"decoder.weight", "head.weight", "twin.weight"}


def test_a_glob_keeps_dense_what_is_below_it_too():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "heads": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert list(view_of(model, keep_dense=["head*"]).weights) == ["body.weight"]
    assert list(view_of(model, keep_dense=["heads.1"]).weights) == ["body.weight", "heads.0.weight"]


def test_groups_keep_prunable_order():
    view = view_of(layers((2, 2), (2, 2), (2, 2)), group_of=lambda name: "odd" if name[0] == "b" else "even")
    assert view.groups == {"even": ["a.weight", "c.weight"], "odd": ["b.weight"]}


def test_groups_that_are_left_out_stay_dense():
    view = view_of(layers((4, 8), (8, 4), (4, 4)))
    left = view.without(["b"])
    assert list(left.weights) == ["a.weight", "c.weight"] and left.dense == ("b.weight",)
    assert left.numel == 32 + 16 and left.model is view.model
    assert list(view.weights) == ["a.weight", "b.weight", "c.weight"] and not view.dense
    assert list(view.without([]).weights) == list(view.weights)
    with pytest.raises(UserError, match="there is no group 'd' to keep dense; there are: a, b, c"):
        view.without(["a", "d"])
    with pytest.raises(UserError, match="nothing would be pruned"):
        view.without(["a", "b", "c"])


def test_conv1d_is_seen_as_out_in_on_its_own_storage():
    model = nn.ModuleDict({"c": Conv1D(3, 5)})
    weight = view_of(model).weights["c.weight"]
    assert weight.transposed and weight.shape == weight.matrix().shape == (3, 5)
    weight.matrix()[1, 2] = 42.0
    assert model["c"].weight[2, 1] == 42.0
    assert weight.as_stored(torch.ones(3, 5)).shape == (5, 3)


@pytest.mark.script
def test_a_compiled_or_wrapped_model_has_the_names_of_the_plain_one():
    model = Attention()
    plain = list(view_of(model).weights)
    assert list(view_of(torch.compile(model)).weights) == plain
    assert list(view_of(nn.DataParallel(model)).weights) == plain


def weight_normed(layer):
    return parametrizations.weight_norm(layer)


def pruned_by_torch(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def with_integers(layer):
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def packed(layer):
    layer.weight = nn.Parameter(torch.zeros(8, 2))
    return layer


@pytest.mark.parametrize("spoil", [weight_normed, pruned_by_torch, with_integers, packed])
def test_weights_that_are_no_plain_matrix_are_refused_by_name(spoil):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": spoil(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match="'bad' cannot be pruned"):
        view_of(model)
    assert list(view_of(model, keep_dense=["bad"]).weights) == ["good.weight"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 8, 8))


@pytest.mark.parametrize("bad", [nn.MultiheadAttention(4, 2, kdim=8), Experts(), nn.LazyLinear(4)])
def test_layers_that_no_hook_can_observe_are_refused_by_name(bad):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": bad})
    with pytest.raises(ValueError, match="'bad' cannot be pruned"):
        view_of(model)
    assert list(view_of(model, keep_dense=["bad"]).weights) == ["good.weight"]


def test_position_embeddings_and_convolutions_are_not_experts():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3)})
    model.position = nn.Parameter(torch.zeros(1, 10, 4))
    assert list(view_of(model).weights) == ["a.weight"]


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(ValueError, match="no prunable weight"):
        view_of(nn.Sequential(nn.ReLU()))


def test_what_a_view_cannot_do_is_said():
    view = view_of(Attention(), forward=None)
    with pytest.raises(ValueError, match="no forward"):
        view.forward(None)
    with pytest.raises(ValueError, match="no loss"):
        view.loss(None)
    assert view.valid_tokens("q.weight", None) is None
