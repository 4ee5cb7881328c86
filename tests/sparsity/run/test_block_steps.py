"""Block steps in a run: what they change, what they leave, and what is refused."""

import logging
import re
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pruners
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.reconstruction.block_steps import train
from sparsity.run import layers
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
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def view_of(model: Net, **options) -> PrunableView:
    given: dict[str, Any] = {"blocks": list(model.blocks)} | options
    return PrunableView(model, group_of=lambda key: "all", forward=model, **given)


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


def test_without_a_reconstruction_masked_weights_are_trained(view):
    options = {"reconstruct": None, "calibration_mode": "sequential"}
    plain = once(view, block_steps=0, **options)
    masks = once(view, **options)
    assert torch.equal(masks["embed.weight"], plain["embed.weight"]) and masks.weights.keys() == masks.keys()
    assert torch.equal(masks.weights["embed.weight"], view.weights["embed.weight"].matrix() * masks["embed.weight"])
    assert all(not masks.weights[name][~masks[name]].any() for name in masks)


def test_blocks_that_follow_see_what_was_trained(view):
    """The second block is pruned to what the first became, and nothing before it changes."""
    plain, masks = once(view, block_steps=0), once(view)
    first, second = "blocks.0.up.weight", "blocks.1.attn.qkv.weight"
    assert torch.equal(plain[first], masks[first]) and not torch.equal(plain.weights[second], masks.weights[second])


@pytest.mark.parametrize("window", ["attention", "mlp", "block"])
def test_windows_say_which_layers_train(window, view):
    plain, masks = once(view, block_steps=0), once(view, block_window=window)
    moved = {
        name.split(".", 2)[2]
        for name in masks
        if name.startswith("blocks.0") and not torch.equal(plain.weights[name], masks.weights[name])
    }
    attention, mlp = {"attn.qkv.weight", "attn.proj.weight"}, {"up.weight", "down.weight"}
    assert moved == {"attention": attention, "mlp": mlp, "block": attention | mlp}[window]
    biases = {key.split(".", 2)[2] for key in masks.biases if key.startswith("blocks.0")}
    norms = {f"{norm}.{kind}" for norm in ("norm", "norm2") for kind in ("weight", "bias")}
    assert biases == norms | {name.replace("weight", "bias") for name in moved}


class KilledError(Exception):
    pass


@pytest.mark.parametrize("finished", [1, 2])
def test_killed_runs_go_on_with_the_same_bits(view, tmp_path, finished, monkeypatch):
    options = {"correct_bias": True, "reconstruct": "lsq", "block_steps": STEPS}
    whole = once(view, **options)

    def run(limit: int | None = None) -> tuple[Masks, int]:
        trained = 0

        def counted(*args, **kwargs):
            nonlocal trained
            if trained == limit:
                raise KilledError
            trained += 1
            return train(*args, **kwargs)

        engine = pruners.build("wanda", **options)
        monkeypatch.setattr(layers, "train", counted)
        reading = CalibrationPass(batches_of(), scratch=Scratch(tmp_path / "run", "data"))
        ((_, masks),) = engine.masks(view, engine.measure(view, reading), Request(["0.6"]), lambda epoch: reading)
        return masks, trained

    with pytest.raises(KilledError):
        run(finished)
    again, trained = run()
    assert trained == 3 - finished and again.digest() == whole.digest()
    for found, expected in ((again.weights, whole.weights), (again.biases, whole.biases)):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list(tmp_path.iterdir())


def test_two_ranks_equal_one():
    """Rounds of batches are shared out as the calibration data does it: round i goes to rank i % 2."""
    data, ranks, found = batches_of(9), Ranks(2), {}
    options = {"calibration_mode": "sequential", "block_steps": 6}  # no solver, whose stop magnifies rounding
    net = Net().double()
    views = [view_of(Net().eval().double()) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), views[0].model.parameters(), strict=True))

    def run(key: str, view: PrunableView, reading: CalibrationPass) -> None:
        engine = pruners.build("wanda", **options)
        ((_, found[key]),) = engine.masks(view, engine.measure(view, reading), Request(["0.6"]), lambda epoch: reading)

    data = [batch.double() for batch in data]
    run("one", views[2], CalibrationPass(data))
    threads = []
    for rank in range(2):
        rounds = [int(i % 2 == rank) for i in range(len(data))]
        reading = CalibrationPass(data[rank::2], reduce=ranks, rounds=rounds, place=(rank, 2))
        threads.append(Thread(target=run, args=(str(rank), views[rank], reading)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in ("0", "1"):
        assert found[rank].digest() == found["one"].digest()
        for name in ("weights", "biases"):
            mine, expected = getattr(found[rank], name), getattr(found["one"], name)
            assert mine.keys() == expected.keys()
            for key in expected:
                # Adam divides by the size of gradients, which magnifies the rounding of small ones.
                torch.testing.assert_close(mine[key], expected[key], rtol=1e-4, atol=1e-6)


def test_weights_that_another_block_uses_are_left_out(caplog):
    model = Net(2)
    first, second = model.blocks
    second.up.weight = first.up.weight  # pyright: ignore
    view = view_of(model.eval())
    plain = once(view, block_steps=0)
    with caplog.at_level(logging.INFO):
        masks = once(view)
    assert "used outside the block, too: blocks.0.up.weight" in caplog.text
    assert len(errors_in(caplog)) == 2 and all(after <= before for before, after in errors_in(caplog))
    assert torch.equal(masks.weights["blocks.0.up.weight"], plain.weights["blocks.0.up.weight"])
    for key in ("norm.weight", "up.bias"):
        assert f"blocks.0.{key}" in masks.biases and (key != "up.bias" or "blocks.1.up.bias" not in masks.biases)
    assert not torch.equal(masks.weights["blocks.0.attn.qkv.weight"], plain.weights["blocks.0.attn.qkv.weight"])


def test_a_layer_of_two_blocks_trains_on_both_its_uses(caplog):
    model = Net(2)
    first, second = model.blocks
    second.up = first.up
    view = view_of(model.eval())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = once(view, block_steps=0, correct_bias=True)
    with caplog.at_level(logging.INFO):
        masks = once(view, correct_bias=True)
    ((worse, better),) = errors_in(caplog)
    assert better < worse and not torch.equal(masks.weights["blocks.0.up.weight"], plain.weights["blocks.0.up.weight"])
    assert torch.equal(masks.biases["blocks.0.up.bias"], masks.biases["blocks.1.up.bias"])
    with masks.applied(view):
        assert torch.equal(model.state_dict()["blocks.0.up.bias"], masks.biases["blocks.0.up.bias"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_run_several_times_train_on_all_their_uses(caplog):
    model = Net(1)
    model.blocks.append(model.blocks[0])
    view = view_of(model.eval(), blocks=[model.blocks[0]])
    with caplog.at_level(logging.INFO):
        masks = once(view)
    ((before, after),) = errors_in(caplog)
    assert after < before
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with masks.applied(view):
        assert torch.equal(model.state_dict()["blocks.1.norm.weight"], masks.biases["blocks.0.norm.weight"])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_half_precision_keeps_its_dtype_and_gets_no_worse(caplog):
    view = view_of(Net().eval().bfloat16())
    with caplog.at_level(logging.INFO):
        masks = once(view, data=[batch.bfloat16() for batch in batches_of()])
    assert all(after <= before for before, after in errors_in(caplog))
    assert {tensor.dtype for tensor in (*masks.weights.values(), *masks.biases.values())} == {torch.bfloat16}


REFUSED = [
    ("wanda", {"block_steps": 5}, "give --calibration_mode sequential"),
    ("magnitude", {"block_steps": 5}, "give --reconstruct lsq"),
    ("chita", {"block_steps": 5}, "--block_steps: chita solves all blocks together"),
    ("wanda", {"block_steps": 5, "reconstruct": "lsq", "epochs": 2}, "--block_steps needs --epochs 1"),
    ("wanda", {"block_window": "mlp"}, "--block_window says which layers --block_steps trains"),
    ("wanda", {"block_steps": 5, "reconstruct": "lsq", "block_window": "heads"}, "block_window must be one of"),
    ("wanda", {"block_steps": -1}, "block_steps must be a whole number from 0"),
]


@pytest.mark.parametrize(("name", "options", "told"), REFUSED, ids=[str(case[1:2]) for case in REFUSED])
def test_refusals(name, options, told):
    with pytest.raises(UserError, match=told) as caught:
        pruners.build(name, **options)
    assert "\n" not in str(caught.value)


def test_models_whose_blocks_do_not_run_alone_are_refused():
    class Opaque(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, cache=object())
            return self.head(x.mean(1))

    class Taking(Block):
        def forward(self, x: Tensor, cache: object) -> Tensor:
            return super().forward(x)

    model = Opaque(0)
    model.blocks.extend(Taking() for _ in range(2))
    with pytest.raises(UserError, match="cannot be run by themselves .*content is unknown.*--recover"):
        once(view_of(model.eval()))
    with pytest.raises(UserError, match="the blocks of this model are not known"):
        once(view_of(Net().eval(), blocks=None))
