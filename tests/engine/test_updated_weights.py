"""A mask that was found together with updated weights says so, where the model has other ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pruners
from engine.updated_weights import warn_of_updates
from models.external.model import prunable_view

PATH = Path("out/vit_alps_50_seed42_pruning_masks.safetensors")


@pytest.fixture
def view():
    torch.manual_seed(0)
    return prunable_view(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval())


def batches():
    return [torch.randn(6, 8, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("options", [{"pruner": "alps"}, {"pruner": "wanda", "reconstruct": "lsq"}])
def test_dense_weights_are_warned_of_and_updated_ones_are_not(view, caplog, options):
    masks = pruners.prune(view, sparsity=0.5, data=batches(), **options)
    caplog.clear()
    warn_of_updates(masks, view, PATH)
    (record,) = caplog.records
    assert str(PATH) in record.message and "vit_alps_50_seed42_weights.safetensors" in record.message
    caplog.clear()
    masks.apply(view)
    warn_of_updates(masks, view, PATH)
    assert not caplog.records


def test_a_mask_alone_is_not_warned_of(view, caplog):
    masks = pruners.prune(view, "wanda", sparsity=0.5, data=batches())
    caplog.clear()
    warn_of_updates(masks, view, PATH)
    assert not caplog.records
