"""Masks from and to torch.nn.utils.prune."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pruners
from models.external.torch_prune import from_torch, to_torch
from sparsity.errors import UserError
from sparsity.view import PrunableView


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4)))


def view_of(module):
    return PrunableView(module, group_of=lambda key: "all")


def test_masks_of_torch_are_ours():
    pruned = model()
    for layer in (pruned[0], pruned[2][0]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    masks = from_torch(pruned)
    assert {n: m.tolist() for n, m in masks.items()} == {
        "0.weight": pruned[0].weight_mask.bool().tolist(),
        "2.0.weight": pruned[2][0].weight_mask.bool().tolist(),
    }
    plain = model()
    masks.apply(view_of(plain))
    for ours, theirs in ((plain[0], pruned[0]), (plain[2][0], pruned[2][0])):
        assert torch.equal(ours.weight, theirs.weight)


def test_there_and_back():
    plain = model()
    view = view_of(plain)
    ((_, masks),) = pruners.build("omp").prune(view, None, [0.6])
    x = torch.randn(3, 8)
    with masks.applied(view), torch.no_grad():
        expected = plain(x)
    to_torch(masks, view)
    assert prune.is_pruned(plain) and torch.equal(plain(x), expected)
    assert from_torch(plain).digest() == masks.digest()
    prune.remove(plain[0], "weight")
    assert torch.equal(plain[0].weight != 0, masks["0.weight"])


def test_attention_keeps_its_own_names():
    torch.manual_seed(0)
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    view = view_of(attention)
    ((_, masks),) = pruners.build("omp").prune(view, None, [0.5])
    to_torch(masks, view)
    assert from_torch(attention).digest() == masks.digest()


def test_what_torch_has_not_pruned_is_refused():
    with pytest.raises(UserError, match="there is no weight_mask"):
        from_torch(model())
