"""Block steps in a run: what they change, what they leave, and what is refused."""

import logging
import re
from threading import Thread

import pytest
import torch
from torch import Tensor, nn

import pruners
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.run.request import Request
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView
from tests.toys import Ranks

pytestmark = pytest.mark.script  # long: left out of make test-fast

WIDTH = 8
STEPS = 20


class Block(nn.Module):
    """Attention over the tokens and an MLP, each after a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        q, k, v = self.attn["qkv"](self.norm(x)).chunk(3, -1)
        x = x + self.attn["proj"](torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return x + self.down(self.up(self.norm2(x)).relu())


class Net(nn.Module):
    def __init__(self, blocks: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = nn.Linear(WIDTH, WIDTH), nn.ModuleList(), nn.Linear(WIDTH, 5)
        self.blocks.extend(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def view_of(model: nn.Module, **options) -> PrunableView:
    return PrunableView(model, group_of=lambda key: "all", forward=model, **{"blocks": list(model.blocks)} | options)


@pytest.fixture
def view():
    return view_of(Net().eval().requires_grad_(False))


def batches_of(count: int = 10, samples: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 4, WIDTH, generator=generator) for _ in range(count)]


def once(view: PrunableView, *, pruner: str = "wanda", data=None, **options) -> Masks:
    given = {"reconstruct": "lsq", "block_steps": STEPS} | options
    ((_, masks),) = pruners.build(pruner, **given).prune(view, data or batches_of(), ["0.6"])
    return masks


def errors_in(caplog) -> list[tuple[float, float]]:
    found = [re.match(r"block steps: held-out error (\S+) -> (\S+),", record.getMessage()) for record in caplog.records]
    return [(float(match[1]), float(match[2])) for match in found if match]


def test_held_out_errors_fall_and_zeros_stay(view, caplog):
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in view.model.named_parameters()}
    plain = once(view, block_steps=0)
    with caplog.at_level(logging.INFO):
        masks = once(view)
    errors = errors_in(caplog)
    assert len(errors) == 3 and all(after <= before for before, after in errors) and errors[0][1] < errors[0][0]
    assert all(torch.equal(masks[name], plain[name]) for name in ("embed.weight", "blocks.0.up.weight"))
    assert all(not masks.weights[name][~masks[name]].any() for name in masks)
    assert torch.equal(masks.weights["embed.weight"], plain.weights["embed.weight"])  # in no block
    assert not torch.equal(masks.weights["blocks.0.up.weight"], plain.weights["blocks.0.up.weight"])
    assert {"blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.up.bias"} <= masks.biases.keys()
    assert all(key.startswith("blocks.") for key in masks.biases)
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())
    assert flags == {key: parameter.requires_grad for key, parameter in view.model.named_parameters()}
    with masks.applied(view):
        state = view.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in masks.biases.items())
        assert not torch.equal(state["blocks.0.norm.weight"], before["blocks.0.norm.weight"])
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())
