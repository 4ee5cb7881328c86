"""Similarities, soft targets and ranking scores under bfloat16 against float64, from the same features."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.blip import retrieval as blip_retrieval
from models.parts.losses import contrastive_loss, hard_negatives
from models.parts.similarity import head, normalised, similarity
from tests.conftest import BLIP_CONFIG, SMALL_BLIP

TEMP = torch.tensor(0.01)
EXACT = {"rtol": 0, "atol": 1e-5}


def features(count, width=256, seed=0):
    """Unit vectors that point the same way, as those of a trained model do: similarities are up to 1."""
    generator = torch.Generator().manual_seed(seed)
    same = torch.randn(1, width, generator=torch.Generator().manual_seed(9))
    return F.normalize(same + 0.5 * torch.randn(count, width, generator=generator), dim=1)


@pytest.mark.parametrize("width", [32, 256, 1024])
def test_similarities_are_those_of_float64(width):
    image, text = features(64, width), features(512, width, 1)
    text[:64] = image
    expected = image.double() @ text.double().t() / TEMP.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity(image, text, TEMP)
        rounded = image @ text.t() / TEMP
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, **EXACT)
    assert (rounded - expected).abs().max() > 0.1  # what autocast makes of it


def test_the_loss_and_its_gradients_are_those_of_float64():
    ids = torch.arange(32) % 30
    gradients = []
    for dtype in (torch.float64, torch.float32):
        image, text = (features(32, seed=seed).to(dtype).requires_grad_() for seed in (0, 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = contrastive_loss(image, text, TEMP, ids)
        loss.backward()
        gradients.append([loss.detach(), image.grad, text.grad])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, **EXACT)


def test_negatives_are_drawn_by_the_same_weights(monkeypatch):
    image, text, drawn = features(16), features(16, seed=1), []
    monkeypatch.setattr(torch, "multinomial", lambda row, *_, **__: drawn.append(row) or row.argmax()[None])
    logits = image.double() @ text.double().t() / TEMP.double()
    with torch.autocast("cpu", torch.bfloat16):
        hard_negatives(image, text, TEMP)
    own = torch.eye(16, dtype=torch.bool)
    weights = [(way.softmax(1) + 1e-5).masked_fill(own, 0.0) for way in (logits.t(), logits)]
    torch.testing.assert_close(torch.stack(drawn).double(), torch.cat(weights), **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_similarities_and_soft_targets_with_queues_are_those_of_float64(alpha):
    torch.manual_seed(0)
    model = blip_retrieval.build(BLIP_CONFIG, SMALL_BLIP / "state_dict.safetensors").train()
    width = BLIP_CONFIG.embed_dim
    image, text, image_keys, text_keys = (features(4, width, seed) for seed in range(4))
    samples = torch.tensor([3, 5, 3, 9])
    texts, images = (
        torch.cat([keys, queue.t()]).double()
        for keys, queue in ((text_keys, model.text_queue), (image_keys, model.image_queue))
    )
    logits = [a.double() @ b.t() / TEMP.double() for a, b in ((image, texts), (text, images))]
    known = torch.cat([samples, model.idx_queue[0]])
    same = (samples[:, None] == known[None, :]).double()
    same = same / same.sum(1, keepdim=True)
    teachers = [a.double() @ b.t() / TEMP.double() for a, b in ((image_keys, texts), (text_keys, images))]
    soft = [alpha * teacher.softmax(1) + (1 - alpha) * same for teacher in teachers]
    loss = sum(-(target * way.log_softmax(1)).sum(1).mean() for target, way in zip(soft, logits, strict=True)) / 2
    with torch.autocast("cpu", torch.bfloat16):
        found = model.similarities((image, text), (image_keys, text_keys), TEMP)
        targets = model.targets(found[0], samples)
        ways = model.soft_targets((image_keys, text_keys), TEMP, targets, alpha)
        total = model.contrastive_loss(found, (image_keys, text_keys), TEMP, targets, alpha)
    for actual, expected in zip((*found, *ways, total), (*logits, *soft, loss), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, **EXACT)


def test_features_are_normalised_in_float32():
    states = torch.randn(8, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = normalised(states)
    torch.testing.assert_close(found.double(), F.normalize(states.double(), dim=1), rtol=0, atol=1e-6)
    assert normalised(states.double()).dtype == torch.float64


def test_a_head_keeps_the_dtype_of_its_weights():
    layer, states = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 2)), torch.randn(512, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(layer, states.bfloat16())
    torch.testing.assert_close(found, layer(states.bfloat16().float()), rtol=0, atol=1e-6)
    assert head(layer.bfloat16(), states).dtype == torch.bfloat16
