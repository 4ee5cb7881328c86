"""Parameter groups, and several optimizers as one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.foreign import AnyOptimizerConfig
from engine.export import save_weights
from engine.training.optimizer import adamw, build_optimizer, finetuning_optimizer, muon
from models.checkpoint import read_weights
from sparsity.errors import UserError

CONFIG = SimpleNamespace(optimizer="muon", lr=0.1, matrix_lr=0.2, weight_decay=0.5, betas=(0.9, 0.98))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(5, 4), nn.Linear(4, 6)
        self.norm, self.down, self.out = nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 5)
        self.out.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        return self.out(self.down(self.norm(self.up(self.embed(ids)).relu()))) * self.scale


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.arange(5)).logsumexp(1).sum().backward()
    optimizer.step()


def names(model, parameters):
    known = {id(p): name for name, p in model.named_parameters()}
    return {known[id(p)] for p in parameters}


def test_norms_biases_and_scalars_do_not_decay():
    model = Net()
    decayed, kept = adamw(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.98)).param_groups
    assert names(model, decayed["params"]) == {"embed.weight", "up.weight", "down.weight"}
    assert names(model, kept["params"]) == {"up.bias", "norm.weight", "norm.bias", "down.bias", "out.bias", "scale"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)


def test_muon_takes_the_matrices_of_layers_but_not_embeddings():
    model = Net()
    optimizer = muon(model, lr=0.1, matrix_lr=0.2, weight_decay=0.5, betas=(0.9, 0.98))
    groups = {group["lr"]: names(model, group["params"]) for group in optimizer.param_groups if group["params"]}
    assert groups[0.2] == {"up.weight", "down.weight"}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(map(id, everything))) == 9


def test_a_chain_steps_all_and_comes_back_from_its_state():
    torch.manual_seed(0)
    model = Net()
    optimizer = build_optimizer(model, CONFIG, "32-true")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(before) - {"frozen"}
    twin = Net()
    twin.load_state_dict(model.state_dict())
    resumed = build_optimizer(twin, CONFIG, "32-true")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer)
        step(twin, resumed)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert len(optimizer.state) == 9


def test_the_name_decides():
    model = Net()
    adam = build_optimizer(model, SimpleNamespace(**vars(CONFIG) | {"optimizer": "adamw"}), "16-mixed")
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["fused"] is False  # Fabric clips no fused ones
    assert build_optimizer(model, SimpleNamespace(**vars(CONFIG) | {"optimizer": "adamw"}), "32-true").defaults["fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_weights_are_all_there(tmp_path, dtype):
    model = Net()
    model.register_buffer("position_ids", torch.arange(3))
    path = save_weights(model, tmp_path / "w.safetensors", dtype)
    weights = read_weights(path)
    assert set(weights) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    first = path.read_bytes()
    assert save_weights(model, path, dtype).read_bytes() == first


def test_an_optimizer_of_timm_has_the_rates_of_the_recipe():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    config = AnyOptimizerConfig(lr=0.01, opt="lamb", weight_decay=0.1, lr_mult=5)
    optimizer = finetuning_optimizer(model, config, ("1.*",), "32-true")
    assert type(optimizer).__name__ == "Lamb"
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    wanted = {"0.weight": (0.01, 0.1), "0.bias": (0.01, 0.0), "1.weight": (0.05, 0.1), "1.bias": (0.05, 0.0)}
    for name, parameter in model.named_parameters():
        assert found[id(parameter)] == pytest.approx(wanted[name])
    with pytest.raises(UserError, match="--optimizer nosuch: "):
        finetuning_optimizer(model, AnyOptimizerConfig(lr=0.01, opt="nosuch"), (), "32-true")
