"""Many architectures, each from its weights to masks, a saved model, a plain reload, and its fidelity."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import pruners
from engine.evaluation.fidelity import Fidelity
from engine.export import save_model
from models.external import model as external
from tests import architectures
from tests.architectures import MIXERS, TIMM_MODELS, TRANSFORMERS_MODELS

TIMM = [*TIMM_MODELS, *MIXERS]
USUAL = ("vit", "swin", "convnext", "mixer", "ViT", "Swin", "BertForMaskedLM", "LlamaForCausalLM", "clip", "florence2")

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


def marked(names):
    """All but some representatives are for make test-all."""
    return [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_there_are_many():
    assert len(TIMM) >= 30 and len(TRANSFORMERS_MODELS) >= 30


@pytest.mark.parametrize("kind", marked(TIMM))
def test_a_model_of_timm(tmp_path, kind):
    torch.manual_seed(0)
    model, batch, make = architectures.timm_model(kind)

    def reload(path):
        again = make().eval()
        again.load_state_dict(load_file(f"{path}.safetensors"))
        return again

    check(model, batch, tmp_path / "pruned", {}, reload)


@pytest.mark.parametrize("kind", marked(TRANSFORMERS_MODELS))
def test_a_model_of_transformers(tmp_path, kind):
    torch.manual_seed(0)
    made, batch = TRANSFORMERS_MODELS[kind]()
    architectures.stirred(made).save_pretrained(tmp_path / "dense")
    model, halves = external.load(f"hf:{tmp_path / 'dense'}", dtype="auto")
    check(model, batch, tmp_path / "pruned", halves, type(model).from_pretrained)


def check(model, batch, path, halves, reload):
    """Prune, save, load with the library alone, and compare with the dense model."""
    view = external.prunable_view(model, halves=halves)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure = Fidelity(model, external.probes(model, view), [batch], to_device=lambda b: b, arithmetic=nullcontext)
    ((_, masks),) = pruners.build("wanda").prune(view, [batch], [0.5])
    dense = measure()
    with masks.applied(view):
        pruned = measure()
        save_model(model, path, view.halves)
    cosines = [name for name in dense if name.startswith(("cos", "pooled"))]
    assert cosines and {name: round(dense[name], 2) for name in cosines} == dict.fromkeys(cosines, 100)
    assert min(pruned[name] for name in cosines) < 99.99
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = reload(path).state_dict()
    for weight in view.weights.values():
        for name in weight.aliases:
            mask = masks[weight.name]
            assert not again[name][~mask].any() and torch.equal(again[name][mask], before[name][mask]), name
