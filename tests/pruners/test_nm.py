"""Magnitude, Wanda and SparseGPT: formulas, calibration on dense and on pruned blocks, kills, refusals."""

import copy
from collections import Counter
from threading import Thread

import pytest
import torch
from torch import nn

import prune
import pruners
from models.blip import model as blip
from models.xvlm import model as xvlm
from sparsity.allocation.budget import budget
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.run.request import Request
from sparsity.run.sequential import Blocks, stages
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.hessian import triangle
from sparsity.statistics.inputs import Statistics
from sparsity.statistics.passes import collect
from sparsity.statistics.reading import CalibrationPass
from tests.sparsity.statistics.test_hessian import naive
from tests.test_scripts import mask_files, no_pictures, prune_options, pruned, refused  # noqa: F401
from tests.toys import Conv1D, Ranks, layers, view_of

pytestmark = pytest.mark.script  # long: left out of make test-fast

PATTERN = NM(2, 4)
ALL = [
    ("wanda", {}),
    ("wanda", {"calibration_mode": "sequential"}),
    ("sparsegpt", {}),
    ("sparsegpt", {"calibration_mode": "dense"}),
    ("sparsegpt", {"enable_update": True}),
    ("sparsegpt", {"enable_update": True, "calibration_mode": "dense"}),
]

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="an accelerator is needed")


class KilledError(Exception):
    pass


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """A layer before, three blocks, and a layer after them."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.project = nn.Linear(width, 8)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.project(x)


@pytest.fixture
def view():
    model = Stack().eval()
    return view_of(model, blocks=list(model.blocks))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 10, 8, generator=generator) for _ in range(5)]


def once(name, view, data, sparsity=None, **options):
    pattern = None if sparsity else PATTERN
    targets = [sparsity] if sparsity else None
    ((_, masks),) = pruners.build(name, **options).prune(view, data, targets, pattern=pattern)
    return masks


def same(a, b):
    return a.digest() == b.digest() and all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)


def inputs_of(view, data, name):
    """The inputs of a layer, (tokens, in), by a hook of our own."""
    seen = []
    (module,) = view.weights[name].modules
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for batch in data:
            view.forward(batch)
    hook.remove()
    return torch.cat(seen)


# Formulas


def test_wanda_is_its_formula(view, batches):
    rows = {name: inputs_of(view, batches, name) for name in view.weights}
    for target in (None, "0.5", "0.63"):
        masks = once("wanda", view, batches, target)
        for name, weight in view.weights.items():
            score = weight.matrix().double().abs() * rows[name].square().sum(dim=0).sqrt()
            groups = score.unflatten(1, (-1, 4)) if target is None else score[:, None]
            gone = 2 if target is None else budget(target, score.shape[1])
            order = groups.argsort(dim=-1, stable=True)[..., :gone]
            expected = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order, False).flatten(1)
            assert torch.equal(masks[name], expected), name


def test_wanda_with_inputs_that_are_always_zero(view, batches):
    silent = [batch.clone() for batch in batches]
    for batch in silent:
        batch[..., 3:] = 0
    for options in ({}, {"sparsity": "0.5"}):
        masks = once("wanda", view, silent, **options)
        kept = masks["embed.weight"]
        assert kept[:, :3].all() if options else (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize(("pruner", "options"), ALL)
def test_offloaded_statistics_give_the_same_masks(view, batches, monkeypatch, pruner, options, device):
    view.model.to(device)
    batches = [batch.to(device) for batch in batches]
    kept, places = Statistics.results, []

    def watched(self):
        found = kept(self)
        places.extend(sums.device.type for sums_of in found.values() for sums in sums_of.values())
        return found

    monkeypatch.setattr(Statistics, "results", watched)
    masks = once(pruner, view, batches, **options, offload=True)
    assert set(places) == {"cpu"}
    plain = once(pruner, view, batches, **options)
    assert places[-1] == device and masks.digest() == plain.digest()


@pytest.mark.parametrize("update", [False, True])
def test_sparsegpt_is_its_formula_layer_by_layer(view, batches, update):
    view.model.double()
    batches = [batch.double() for batch in batches]
    for target in (None, "0.63"):
        options = {"enable_update": update, "calibration_mode": "dense"}
        masks = once("sparsegpt", view, batches, target, **options)
        for name, weight in view.weights.items():
            how = {"pattern": PATTERN} if target is None else {"sparsity": target}
            kept, values = naive(weight.matrix(), inputs_of(view, batches, name), update=update, **how)
            assert torch.equal(masks[name], kept), name
            if update:
                torch.testing.assert_close(masks.weights[name], values, rtol=1e-7, atol=1e-9)
        assert set(masks.weights) == (set(view.weights) if update else set())


def test_magnitude_is_omp_within_layers(view):
    for target in ("0.5", None):
        pool = {"pool": "layer"} if target else {}
        assert same(once("magnitude", view, None, target), once("omp", view, None, target, **pool))


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)], ids=str)
def test_every_group_keeps_n(view, batches, name, options, pattern):
    ((_, masks),) = pruners.build(name, **options).prune(view, batches, None, pattern=pattern)
    for mask in masks.values():
        assert (mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    for key, weight in masks.weights.items():
        assert (weight[~masks[key]] == 0).all()


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_the_batch_size_changes_nothing(view, batches, name, options):
    images = torch.cat(batches)
    one, other = once(name, view, images.split(1), **options), once(name, view, [images[:7], images[7:]], **options)
    assert one.digest() == other.digest()
    for key, weight in one.weights.items():
        torch.testing.assert_close(other.weights[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_the_model_is_what_it_was_also_after_an_exception(view, batches, name, options):
    state = copy.deepcopy(view.model.state_dict())
    storage = {key: parameter.data_ptr() for key, parameter in view.model.named_parameters()}

    def untouched():
        pointers = {key: parameter.data_ptr() for key, parameter in view.model.named_parameters()}
        return pointers == storage and all(torch.equal(state[k], v) for k, v in view.model.state_dict().items())

    once(name, view, batches, **options)
    assert untouched() and not any(module._forward_pre_hooks for module in view.model.modules())
    calls = iter(range(100))

    def failing(batch):
        if next(calls) == 3:  # the first is that in which the order of blocks is seen
            raise KilledError
        return view.model(batch)

    with pytest.raises(KilledError):
        once(name, view_of(view.model, blocks=view.blocks, forward=failing), batches, **options)
    assert untouched() and not any(module._forward_pre_hooks for module in view.model.modules())


@pytest.mark.parametrize("options", [{}, {"enable_update": True}], ids=str)
def test_a_transposed_layer_is_pruned_as_its_transpose(batches, options):
    model, plain = nn.ModuleDict({"a": Conv1D(12, 8)}), nn.ModuleDict({"a": nn.Linear(8, 12)})
    plain["a"].weight.data = model["a"].weight.data.t().clone()
    one, other = (once("sparsegpt", view_of(m, forward=m["a"]), batches, **options) for m in (model, plain))
    assert torch.equal(one["a.weight"], other["a.weight"].t())
    assert not options or torch.equal(one.weights["a.weight"], other.weights["a.weight"].t())


def test_layers_that_do_not_divide_are_reported_and_stay_as_they_are(caplog):
    model = layers((6, 8), (4, 6))
    view = view_of(model, forward=lambda x: model["b"](model["a"](x)))
    data = [torch.randn(20, 8, generator=torch.Generator().manual_seed(2))]
    masks = once("sparsegpt", view, data, enable_update=True)
    assert masks["b.weight"].all() and torch.equal(masks.weights["b.weight"], model["b"].weight)
    assert masks.provenance["dense_layers"] == ["b.weight"]
    assert "1 layers stay dense, as 4 does not divide their inputs: b.weight" in caplog.text


# Block by block


def watch(monkeypatch):
    """A list of the names of each pass, which grows as passes begin."""
    held, before = [], Statistics.__init__

    def spy(self, view, measures, names=None, **options):
        held.append(list(names))
        before(self, view, measures, names, **options)

    monkeypatch.setattr(Statistics, "__init__", spy)
    return held


def test_stages_are_blocks_in_order_with_what_is_around_them(view):
    found = stages(view)
    assert found[0] == ["embed.weight"] and found[-1] == ["project.weight"]
    assert found[1:-1] == [[f"blocks.{i}.up.weight", f"blocks.{i}.down.weight"] for i in range(3)]
    assert stages(view_of(view.model)) == [list(view.weights)]


def test_sequential_is_dense_for_the_first_block_and_another_later(view, batches):
    for update in (False, True):
        options = {"enable_update": update}
        dense = once("sparsegpt", view, batches, calibration_mode="dense", **options)
        blocks = once("sparsegpt", view, batches, **options)
        assert torch.equal(dense["embed.weight"], blocks["embed.weight"])
        assert any(not torch.equal(dense[name], blocks[name]) for name in view.weights)


def test_each_block_reads_what_the_pruned_blocks_before_it_put_out(view, batches):
    """Against pruning a copy in place, a block after the other."""
    masks = once("sparsegpt", view, batches, enable_update=True)
    model = copy.deepcopy(view.model)
    step = view_of(model, blocks=list(model.blocks))
    dense = {"enable_update": True, "calibration_mode": "dense"}
    for names in stages(view):
        now = once("sparsegpt", step, batches, **dense)
        with torch.no_grad():
            for name in names:
                assert torch.equal(masks[name], now[name])
                torch.testing.assert_close(masks.weights[name], now.weights[name])
                step.weights[name].parameter.copy_(now.weights[name])


def test_one_block_at_a_time_is_held(view, batches, monkeypatch):
    held = watch(monkeypatch)
    once("sparsegpt", view, batches)
    assert held == stages(view)


def test_what_blip_shares_is_pruned_by_both_uses(small_blip, blip_batches):
    view, data = blip.prunable_view(small_blip), blip_batches["general"][:3]
    order = stages(view)
    assert sorted(name for names in order for name in names) == sorted(view.weights)
    pair = next(names for names in order if any(".layer.0." in n for n in names if n.startswith("text_decoder")))
    assert any(name.startswith("text_encoder.encoder.layer.0.intermediate") for name in pair)
    name = "text_encoder.encoder.layer.1.intermediate.dense.weight"
    weight = view.weights[name]
    assert len(weight.modules) == 2
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].double())) for m in weight.modules]
    with torch.no_grad():
        for batch in data:
            view.forward(batch)
    for hook in hooks:
        hook.remove()
    real = [batch["text_atts"].bool() for batch in data for _ in weight.modules]
    rows = torch.cat([x[mask] for x, mask in zip(seen, real, strict=True)])
    found = collect(view, "hessian", data, names=[name])[name]
    torch.testing.assert_close(
        triangle(found, rows.shape[1]), (2 / len(rows) * rows.t() @ rows).triu(), rtol=1e-5, atol=1e-6
    )
    masks = once("sparsegpt", view, data, calibration_mode="dense")
    kept, _ = naive(weight.matrix().double(), rows, pattern=PATTERN, update=False)
    assert torch.equal(masks[name], kept)
    once("sparsegpt", view, data, enable_update=True).check(view)


def test_xvlm_goes_through_its_towers(small_xvlm, small_batches):
    view = xvlm.prunable_view(small_xvlm)
    assert [len(names) > 0 for names in stages(view)] == [True] * 10  # 2 + 8 blocks, and nothing outside
    masks = once("sparsegpt", view, small_batches["general"][:2] + small_batches["region"][:1], enable_update=True)
    masks.check(view)


def test_ranks_add_up(view, batches):
    expected = once("sparsegpt", view, batches, enable_update=True)
    found, reduce = {}, Ranks(2)

    def work(rank):
        model = copy.deepcopy(view.model)
        own = view_of(model, blocks=list(model.blocks))
        pruner = pruners.build("sparsegpt", enable_update=True)
        ((_, found[rank]),) = pruner.prune(own, batches[rank::2], None, pattern=PATTERN, reduce=reduce)

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].digest() == found[1].digest() == expected.digest()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found[0].weights[name], weight)


# Kills


@pytest.mark.parametrize("options", [{}, {"enable_update": True}], ids=str)
def test_a_run_that_was_killed_goes_on_after_the_last_block(view, batches, tmp_path, options, monkeypatch):
    passes, saved, save = watch(monkeypatch), [], Blocks.save

    def run(limit=99):
        passes.clear()
        saved.clear()

        def saving(progress, number, block, *more):
            if len(saved) == limit:
                raise KilledError
            saved.append(number)
            save(progress, number, block, *more)

        monkeypatch.setattr(Blocks, "save", saving)
        pruner = pruners.build("sparsegpt", **options)
        reading = CalibrationPass(batches, scratch=Scratch(tmp_path / "run", "data"))
        measured = pruner.measure(view, reading)
        return list(pruner.masks(view, measured, Request(["0.5", "0.75"]), lambda epoch: reading))

    with pytest.raises(KilledError):
        run(limit=3)
    assert len(list(tmp_path.iterdir())) == 3
    resumed = run()
    assert passes == stages(view)[3:] + stages(view)
    assert not list(tmp_path.iterdir()), "files of blocks are removed at the end"
    whole = run()
    assert all(same(a, b) for (_, a), (_, b) in zip(resumed, whole, strict=True))
    with pytest.raises(KilledError):
        run(limit=3)
    with torch.no_grad():
        view.model.embed.weight += 0.1  # another model: nothing of the old one is used
    run()
    assert passes == stages(view) * 2


# The command line


@pytest.mark.script
@pytest.mark.parametrize("options", [("wanda",), ("sparsegpt", "--enable-update")], ids=" ".join)
def test_blocks_one_after_the_other_by_command(tmp_path, options):
    sequential = [*options, "--pattern", "2:4", "--calibration_mode", "sequential"]
    first = pruned(tmp_path / "a", *sequential)
    assert mask_files(first) == mask_files(pruned(tmp_path / "b", *sequential))
    dense = pruned(tmp_path / "c", *options, "--pattern", "2:4", "--calibration-mode", "dense")
    assert Counter(mask_files(first)) != Counter(mask_files(dense))
    (path,) = first.glob("*_pruning_masks.safetensors")
    assert Masks.load(path).provenance["calibration_mode"] == "sequential"
    assert bool(list(first.glob("*_weights.safetensors"))) == ("--enable-update" in options)
    assert not list(first.glob("*.block*"))


@pytest.mark.script
def test_pools_and_scores_that_cannot_be(tmp_path):
    for options, told in (
        (["--pool", "global", "-s", "50"], "take allocation layer, or calibration_mode dense"),
        (["--save_scores", "-s", "50"], "--save_scores"),
    ):
        with pytest.raises(ValueError, match=told):
            prune.main(prune_options(tmp_path, "sparsegpt", *options))
