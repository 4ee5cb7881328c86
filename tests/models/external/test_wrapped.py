"""The view of a wrapped model is the view of the bare one: names, groups, head, loss, masks."""

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import pruners
from models.external import model as external
from sparsity.view import PrunableView, bare
from tests.tiny_models import TRANSFORMERS, batch_for, make_timm

pytestmark = pytest.mark.script


@pytest.fixture
def group(tmp_path):
    """One rank, for DDP."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fabric(model):
    return Fabric(accelerator="cpu", devices=1).setup(model)


def inside(model):
    """Some of its blocks are compiled, one by one."""
    for children in [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]:
        for name, child in list(children.named_children()):
            children._modules[name] = torch.compile(child, backend="eager")
    return model


def in_place(model):
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for child in module:
                child.compile(backend="eager")
    return model


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "Fabric": fabric,
    "compile in DDP": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "DDP in compile": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "compile in Fabric": lambda model: fabric(torch.compile(model, backend="eager")),
    "Fabric in compile": lambda model: torch.compile(fabric(model), backend="eager"),
    "blocks": inside,
    "blocks in place": in_place,
}


def models_and_batches(kind):
    torch.manual_seed(0)
    if kind != "vit":
        return TRANSFORMERS[kind]().eval(), [batch_for(kind, seed) for seed in range(2)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(2)]
    return make_timm("vit").eval(), [(image, torch.tensor([0, 3])) for image in images]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["vit", "clip"])
@pytest.mark.usefixtures("group")
def test_the_view_of_a_wrapped_model_is_that_of_the_bare_one(kind, wrapper):
    model, batches = models_and_batches(kind)
    plain = external.prunable_view(model)
    expected = {
        "weights": [(w.name, w.aliases, w.uses, w.group) for w in plain.weights.values()],
        "dense": plain.dense,
        "blocks": len(plain.blocks),
        "loss": [plain.loss(batch).item() for batch in batches],
    }
    masks = {
        name: next(pruners.build(name).prune(plain, batches, [0.5]))[1].digest() for name in ("omp", "snip", "wanda")
    }

    view = external.prunable_view(WRAPPERS[wrapper](model))
    assert [(w.name, w.aliases, w.uses, w.group) for w in view.weights.values()] == expected["weights"]
    assert view.dense == expected["dense"] and len(view.blocks) >= 1
    assert wrapper.startswith("blocks") or (view.model is model and len(view.blocks) == expected["blocks"])
    assert [view.loss(batch).item() for batch in batches] == expected["loss"]
    for name, digest in masks.items():
        assert next(pruners.build(name).prune(view, batches, [0.5]))[1].digest() == digest, name
    own = external.own_loss(WRAPPERS[wrapper](model) if wrapper == "compile" else model, batches[0])
    assert own.item() == expected["loss"][0]


@pytest.mark.usefixtures("group")
def test_globs_over_names_of_a_wrapped_model():
    model, _ = models_and_batches("clip")
    options = {"include": ["*.mlp"], "exclude": ["vision_model.*.1.*"], "groups": {"a": ["*.fc1"]}}
    expected = {w.name: w.group for w in external.prunable_view(model, **options).weights.values()}
    for wrap in (DataParallel, DistributedDataParallel, fabric, inside):
        found = external.prunable_view(wrap(models_and_batches("clip")[0]), **options).weights.values()
        assert {w.name: w.group for w in found} == expected, wrap


def test_views_of_ones_own_are_of_the_bare_model_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrapped = DataParallel(model)
    view = PrunableView(wrapped, group_of=lambda name: "all")
    assert view.model is bare(wrapped) is model and list(view.weights) == ["0.weight", "1.weight"]


def test_a_child_of_the_models_own_that_is_called_as_wrappers_call_theirs():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.module = nn.Linear(4, 4)

    assert bare(model := Own()) is model
    assert list(PrunableView(model, group_of=lambda name: "all").weights) == ["inner.module.weight"]
