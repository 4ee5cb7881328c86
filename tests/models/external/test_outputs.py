"""Parts that are compared of the outputs of models of timm and transformers."""

import copy

import pytest
import torch
from torch import nn

from models.external import model as external
from models.external.outputs import outputs_of
from sparsity.errors import UserError
from tests import tiny_models

KINDS = {
    "clip": {"text_embeds": "embedding", "image_embeds": "embedding"},
    "siglip": {"text_embeds": "embedding", "image_embeds": "embedding"},
    "blip2": {"logits": "logits"},
    "llava": {"logits": "logits"},
    "qwen": {"logits": "logits"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_transformers(kind):
    torch.manual_seed(0)
    model, batch = tiny_models.TRANSFORMERS[kind]().eval(), tiny_models.batch_for(kind)
    found = external.prunable_view(model).outputs(batch)
    assert {name: output.kind for name, output in found.items()} == KINDS[kind]
    if "logits" in found:
        assert torch.equal(found["logits"].real, batch["attention_mask"] != 0)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_classifiers_of_timm_have_logits_and_others_states(kind):
    model, images = tiny_models.make_timm(kind).eval(), torch.randn(2, 3, *2 * [tiny_models.side(kind)])
    view = external.prunable_view(model)
    for batch in (images, (images, torch.tensor([0, 1]))):
        (output,) = view.outputs(batch).values()
        assert output.kind == "logits" and torch.equal(output.tensor, model(images))
    model.reset_classifier(0)
    (output,) = external.prunable_view(model, include=["blocks.*"] if kind == "vit" else []).outputs(images).values()
    assert output.kind == "states"


def test_a_copy_is_asked_where_it_is_given():
    model = tiny_models.make_timm("vit").eval()
    other, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    nn.init.zeros_(other.head.weight)
    found = external.prunable_view(model).outputs(images, other)["logits"].tensor
    assert torch.equal(found, other(images)) and not torch.equal(found, model(images))


def test_maps_have_their_classes_last():
    logits = torch.randn(2, 5, 4, 3)
    assert torch.equal(outputs_of({"logits": logits}, {})["logits"].tensor, logits.permute(0, 2, 3, 1))


def test_predictions_that_are_no_logits_are_states():
    result = {"loss": torch.tensor(1.0), "depth": torch.randn(2, 4), "sizes": torch.ones(2, 2, dtype=torch.long)}
    assert {name: output.kind for name, output in outputs_of(result, {}).items()} == {"depth": "states"}
    assert set(outputs_of((torch.randn(2, 3), None, torch.randn(2, 3)), {})) == {"0", "2"}


def test_nothing_to_compare():
    with pytest.raises(UserError, match="no floating-point tensor"):
        outputs_of({"loss": torch.tensor(1.0)}, {})
