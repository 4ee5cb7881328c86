"""Sequential calibration within blocks: layers that read one tensor see what the pruned ones before them give."""

import pytest
import torch
from torch import nn

import pruners
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.replay.replayed import Replayed
from sparsity.run.request import Request
from sparsity.run.sequential import stages
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.readers import by_inputs
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

GROUPS = [["q", "k", "v"], ["out"], ["fc1"], ["fc2"]]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc2, self.fc1 = nn.Linear(16, 8), nn.Linear(8, 16)  # registered in another order than they run
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.out((self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y))
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def view_of(model):
    return PrunableView(model, group_of=lambda name: "vision", forward=model, blocks=list(model))


@pytest.fixture
def view():
    torch.manual_seed(0)
    return view_of(nn.Sequential(Block(), Block()).eval())


def batches_of(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, 8, generator=generator) for _ in range(count)]


def expected(blocks=2):
    return [[f"{block}.{layer}.weight" for layer in group] for block in range(blocks) for group in GROUPS]


def pruned(view, data, name="wanda", **options):
    options = {"calibration_mode": "sequential", "scope": "row", "calibrate_within": "stage"} | options
    return pruners.prune(view, name, sparsity="0.5", data=data, **options)


def test_layers_that_read_one_tensor_are_a_group_in_the_order_in_which_they_run(view):
    assert by_inputs(view, stages(view), batches_of()[0]) == expected()
    with Replayed(view, batches_of, stages(view), divided=True) as replayed:
        assert replayed.order == expected()


def test_a_layer_that_is_not_reached_comes_last(view):
    view.model[0].register_module("unused", nn.Linear(8, 8))
    view = view_of(view.model)
    assert by_inputs(view, stages(view), batches_of()[0]) == [*expected()[:4], ["0.unused.weight"], *expected()[4:]]


def test_masks_are_those_of_a_whole_pass_for_each_group(view):
    """Bit for bit, against the model run anew before each group, with all that comes before it pruned."""
    data, masks = batches_of(), pruned(view, batches_of())
    for names in expected():
        rows = inputs_of(view, names, data)
        for name in names:
            weight = view.weights[name].parameter.data
            norms = rows[name].double().square().sum(0).sqrt()
            order = (weight.double().abs() * norms).argsort(dim=1)
            kept = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, : weight.shape[1] // 2], False)
            assert torch.equal(masks[name], kept), name
            weight.mul_(kept)


def inputs_of(view, names, data):
    """Return what some layers read in whole passes, name -> (tokens, in)."""
    rows = {name: [] for name in names}
    hooks = [
        view.weights[name].modules[0].register_forward_pre_hook(lambda _, args, own=rows[name]: own.append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            view.model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found).flatten(0, 1) for name, found in rows.items()}


def test_it_is_another_mask_than_within_blocks(view):
    data = batches_of()
    within, whole = pruned(view, data), pruned(view, data, calibrate_within="block")
    first = [name for group in expected()[:1] for name in group]
    assert all(torch.equal(within[name], whole[name]) for name in first)
    assert within.digest() != whole.digest()


@pytest.mark.parametrize("options", [{}, {"target": "dense:0.5", "correct_bias": True, "damp": "auto"}])
def test_a_killed_run_goes_on_to_the_same_bits(view, tmp_path, options, monkeypatch):
    data = batches_of()
    engine = pruners.build("magnitude", reconstruct="lsq", scope="row", calibrate_within="stage", **options)

    def run(folder):
        reading = CalibrationPass(data, scratch=Scratch(folder / "kept", "data"))
        measured = engine.measure(view, reading, Request(["0.5"]))
        ((_, masks),) = engine.masks(view, measured, Request(["0.5"]), lambda step: reading)
        return masks

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, measure, count = run(tmp_path / "whole"), Replayed.measure, []

    def killed(self, *args, **more):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return measure(self, *args, **more)

    monkeypatch.setattr(Replayed, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    assert len(count) == 6 + 3, "the groups that were done are not measured again"
    assert resumed.digest() == whole.digest()
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)


def test_it_is_written_down(view, tmp_path):
    masks = pruned(view, batches_of())
    masks.save(tmp_path / "m.safetensors")
    assert Masks.load(tmp_path / "m.safetensors").provenance["calibrate_within"] == "stage"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("wanda", {"calibrate_within": "stage"}, "--calibrate_within divides the blocks of --calibration_mode sequent"),
        ("omp", {"calibrate_within": "stage"}, "--calibrate_within"),
        ("sparsegpt", {"calibrate_within": "layer"}, "calibrate_within"),
        ("alps", {"calibrate_within": "stage", "block_steps": 5}, "leave --calibrate_within out"),
    ],
)
def test_what_it_does_not_go_with_is_refused(name, options, told):
    with pytest.raises(UserError, match=told):
        pruners.build(name, **options)
