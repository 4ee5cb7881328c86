"""CHITA and CHITA++ on XVLM and in the scripts: exact, the weights that come with the masks, kills, refusals."""

import copy
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import prune
import pruners
from engine.pruning.comparison import Entry, sharing
from models.xvlm import model as xvlm
from sparsity.allocation.budget import SCHEDULES, budget, step_sparsity
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.run.engine import Measured
from sparsity.run.request import Request
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from tests.test_scripts import mask_files, no_pictures, prune_options, pruned, refused, script  # noqa: F401
from tests.toys import Conv1D, layers, view_of

pytestmark = pytest.mark.script

ROUNDS = [2, 2, 2]
FILES = ["xvlm_chita_50_seed42_pruning_masks.safetensors", "xvlm_chita_50_seed42_weights.safetensors"]


@pytest.fixture
def view(small_xvlm):
    return xvlm.prunable_view(small_xvlm)


@pytest.fixture
def in_lockstep(small_batches):
    """Rounds of a general and a region batch."""
    pairs = zip(small_batches["general"], small_batches["region"], strict=True)
    return [batch for pair in pairs for batch in pair]


@pytest.fixture
def epochs(in_lockstep):
    """Fresh batches for two epochs: two rounds each."""
    return [in_lockstep[:4], in_lockstep[4:8]]


def chita(view, data, sparsities, *, scratch=lambda epoch: None, computed=None, **options):
    """Sparsity -> masks, from rounds of two batches."""
    pruner = pruners.build("chita", **options)

    def reading(epoch):
        if computed is not None:
            computed.append(epoch)
        return CalibrationPass(data[epoch], rounds=[2] * (len(data[epoch]) // 2), scratch=scratch(epoch))

    return dict(pruner.masks(view, pruner.measure(view, reading(0)), Request(sparsities), reading))


def same(a, b):
    return a.digest() == b.digest() and all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)


def parameters(view):
    return {name: weight.parameter.detach().clone() for name, weight in view.weights.items()}


# What it gives


@pytest.mark.parametrize("steps", [1, 2])
def test_exact_and_the_model_is_what_it_was(view, epochs, steps):
    before, images = copy.deepcopy(view.model.state_dict()), sum(len(batch["image"]) for batch in epochs[0])
    for sparsity, masks in chita(view, epochs, ["0.3", "0.635"], epochs=steps).items():
        masks.check(view)
        assert masks.total - masks.kept == budget(sparsity, view.numel)
        assert list(masks.weights) == list(view.weights)
        assert all(not weight[~masks[name]].any() for name, weight in masks.weights.items())
        assert masks.provenance["epochs"] == steps and masks.provenance["rows"] == 2
        assert masks.provenance["batch_size"] == images / 2, "images of a general and a region batch"
    after = view.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None for p in view.model.parameters())


def test_masks_put_the_updated_weights_in(view, epochs):
    masks, before = chita(view, epochs, ["0.5"])["0.5"], parameters(view)
    assert any((masks.weights[name] != before[name] * masks[name]).any() for name in before)
    with pytest.raises(KeyboardInterrupt), masks.applied(view):
        assert all(torch.equal(weight, masks.weights[name]) for name, weight in parameters(view).items())
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in parameters(view).items())
    masks.apply(view)
    assert all(torch.equal(weight, masks.weights[name]) for name, weight in parameters(view).items())


def test_every_name_of_a_tied_weight_and_a_transposed_layer():
    model = layers((6, 4))
    model["b"], model["c"] = torch.nn.Linear(4, 6, bias=False), Conv1D(5, 6)
    model["b"].weight = model["a"].weight

    def loss(batch, _):
        return model["c"](model["a"](batch) + model["b"](batch).relu()).square().mean()

    view = view_of(model, loss=loss)
    batches = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    ((_, masks),) = pruners.build("chita").prune(view, batches, ["0.4"])
    assert masks.aliases == {"a.weight": ("a.weight", "b.weight")}
    assert masks.total - masks.kept == budget("0.4", 24 + 30) and masks["c.weight"].shape == (6, 5)
    renamed = {"b.weight": masks["a.weight"], "c.weight": masks["c.weight"]}
    weights = {"b.weight": masks.weights["a.weight"], "c.weight": masks.weights["c.weight"]}
    Masks(renamed, weights=weights).apply(view)
    assert torch.equal(model["a"].weight, masks.weights["a.weight"]) and model["a"].weight is model["b"].weight
    assert torch.equal(model["c"].weight, masks.weights["c.weight"])


def test_weights_without_a_mask_are_refused():
    with pytest.raises(ValueError, match="no mask of the shape .*'b'"):
        Masks({"a": torch.ones(2, dtype=torch.bool)}, weights={"b": torch.ones(2)})


def test_a_pattern(view, in_lockstep):
    ((sparsity, masks),) = pruners.build("chita").prune(view, in_lockstep[:2], None, pattern=NM(1, 4))
    assert float(sparsity) == 0.75 and masks.provenance["pattern"] == "1:4"
    for name in view.weights:
        assert (masks[name].unflatten(1, (-1, 4)).sum(-1) == 1).all() and not masks.weights[name][~masks[name]].any()


def test_two_steps_are_one_after_the_other(view, epochs):
    """CHITA++: the second step starts from the pruned and updated weights, on fresh batches; zeros stay."""
    both = chita(view, epochs, ["0.6"], epochs=2, schedule="linear")["0.6"]
    half = step_sparsity("0.6", 1, 2, "linear")
    first = chita(view, epochs[:1], [half])[half]
    assert all(not (both[name] & ~first[name]).any() for name in first), "what was pruned came back"
    assert same(chita(view, epochs, ["0.6", half], epochs=2, schedule="linear")["0.6"], both)
    before = parameters(view)
    pruner = pruners.build("chita")
    with first.applied(view):
        measured = pruner.measure(view, CalibrationPass(epochs[1], rounds=[2, 2]))
        assert isinstance(measured, Measured) and measured.whole.n == 2
        second = pruner._solve_all(
            pruner.plan.reconstruction, view, measured, Request(["0.6"]), CalibrationPass(), first, {}
        )
    assert same(second, both)
    assert all(torch.equal(weight, before[name]) for name, weight in parameters(view).items())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_end_exactly(view, epochs, schedule):
    masks = chita(view, [*epochs, epochs[0]], ["0.63"], epochs=3, schedule=schedule)["0.63"]
    assert masks.total - masks.kept == budget("0.63", view.numel)


# Memory, files, kills


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("row_dtype", ["float32", "bfloat16"])
def test_the_answer_does_not_depend_on_the_budget(view, epochs, tmp_path, row_dtype, steps):
    def scratch(epoch):
        return Scratch(tmp_path / f"epoch{epoch}", f"data {epoch}")

    options = {"row_dtype": row_dtype, "epochs": steps}
    inside = chita(view, epochs, ["0.5", "0.7"], **options)
    filed = chita(view, epochs, ["0.5", "0.7"], memory_budget=0, scratch=scratch, **options)
    assert all(same(filed[sparsity], masks) for sparsity, masks in inside.items())
    assert not list(tmp_path.iterdir()), "what was kept is removed in the end"


def test_a_killed_chita_plus_plus_goes_on_with_the_next_step(view, epochs, tmp_path):
    def scratch(epoch):
        if broken and epoch == 1 and len(computed) > 6:  # in the third sparsity
            raise KeyboardInterrupt
        return Scratch(tmp_path / f"epoch{epoch}", f"data {epoch}")

    computed, broken = [], True
    options = {"epochs": 2, "memory_budget": 0, "scratch": scratch, "computed": computed}
    expected = chita(view, epochs, ["0.5", "0.7", "0.8"], epochs=2)
    with pytest.raises(KeyboardInterrupt):
        chita(view, epochs, ["0.5", "0.7", "0.8"], **options, lambda_=1e-4)
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        chita(view, epochs, ["0.5", "0.7", "0.8"], **options)
    assert computed == [0, *[0, 1] * 3], "steps with another lambda are not gone on with"
    broken = False
    computed.clear()
    found = chita(view, epochs, ["0.5", "0.7", "0.8"], **options)
    assert computed == [0, 1], "two sparsities were done, and the first step of the third"
    assert all(same(found[sparsity], masks) for sparsity, masks in expected.items())
    assert found["0.5"].provenance == expected["0.5"].provenance
    assert not list(tmp_path.iterdir())


@pytest.mark.script
def test_a_killed_script_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    options = ("-s", "50", "--memory_budget", "0")
    whole = pruned(tmp_path / "whole", "chita", "-s", "50")
    calls, loss = [], xvlm.XVLM.forward

    def counted(model, *given, **named):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return loss(model, *given, **named)

    monkeypatch.setattr(xvlm.XVLM, "forward", counted)
    limit = 4  # in the second of three rounds
    with pytest.raises(KeyboardInterrupt):
        pruned(tmp_path / "killed", "chita", *options)
    account = json.loads((tmp_path / "killed/chita/chita_epoch0_rank0.json").read_text())
    assert len(account["images"]) == 1
    calls.clear()
    limit = None
    folder = pruned(tmp_path / "killed", "chita", *options)
    assert len(calls) == 4, "the first round is there"
    for file in FILES:
        assert load_equal(folder / file, whole / file)
    assert not list(folder.glob("chita_epoch*"))
    calls.clear()
    pruned(tmp_path / "killed", "chita", *options, "--seed", "43")
    assert len(calls) == 6, "another seed reads other data"


def load_equal(one, two):
    a, b = load_file(one), load_file(two)
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# In the scripts


@pytest.mark.script
def test_the_weights_are_written_beside_the_masks(tmp_path, capsys):
    folder = pruned(tmp_path, "chita", "-s", "50,75")
    told = capsys.readouterr().out
    for sparsity in ("50", "75"):
        masks = Masks.load(folder / f"xvlm_chita_{sparsity}_seed42_pruning_masks.safetensors")
        weights = load_file(folder / f"xvlm_chita_{sparsity}_seed42_weights.safetensors")
        assert set(weights) == {key for name in masks for key in masks.aliases.get(name, (name,))}
        assert all(not weights[name][~mask].any() and weights[name].any() for name, mask in masks.items())
        assert f"xvlm_chita_{sparsity}_seed42_weights.safetensors" in told
        assert masks.provenance["config"]["row_dtype"] == "float32"
    omp = pruned(tmp_path, "omp", "-s", "50")
    assert not list(omp.glob("*weights*"))


@pytest.mark.script
def test_what_is_needed_is_said_and_too_much_is_refused_before_any_forward(tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "sparsity")
    pruned(tmp_path / "said", "chita", "-s", "50", "--memory_budget", "0")
    (line,) = (record.getMessage() for record in caplog.records if record.name.endswith(".chita"))
    assert line.startswith("chita: 3 gradient rows of ") and line.endswith(" in a file")
    usage = namedtuple("usage", "total used free")(0, 0, 3 * 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(xvlm.XVLM, "forward", lambda *given: pytest.fail("a forward pass"))
    monkeypatch.setattr("engine.evaluation.retrieval.ZeroShot.__call__", lambda self: pytest.fail("an evaluation"))
    given = prune_options(tmp_path / "refused", "chita", "-s", "50", "--memory_budget", "1KB", "--evaluate")
    told = refused(capsys, prune.main, given)
    assert "--num_batches 3: " in told and "more than --memory_budget 1 KB" in told and "300 KB free in" in told
    numel = int(told.partition("batches on ")[2].partition(" weights")[0].replace(",", ""))
    assert told.endswith("at most --num_batches 2 fits") and 3 * 10**5 // (4 * numel) == 2
    assert not list((tmp_path / "refused").rglob("*.rows"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--save_scores"], "--save_scores: chita has no scores"),
        (["--pool", "layer"], "leave pool 'layer' out"),
        (["--pattern", "2:4", "-e", "2"], "a pattern needs epochs = 1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, options, told, monkeypatch, capsys):
    monkeypatch.setattr(xvlm.XVLM, "forward", lambda *given: pytest.fail("a forward pass"))
    assert told in refused(capsys, prune.main, prune_options(tmp_path, "chita", *options))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"schedule": "cosine"}, "schedule must be one of linear, exp, const"),
        ({"lambda_": 0.0}, "lambda_ must be above 0"),
        ({"schedule": "linear"}, "--schedule is how --epochs above 1 reach the sparsity"),
        ({"reconstruct": "none"}, "updates the weights that it keeps"),
        ({"scope": "row"}, "leave --allocation and --scope out"),
        ({"row_dtype": "int8"}, "row_dtype must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_options_that_cannot_be(options, told):
    with pytest.raises(ValueError, match=told):
        pruners.build("chita", **options)


def test_batches_of_the_python_call(view, in_lockstep):
    pruner = pruners.build("chita")
    with pytest.raises(ValueError, match="give a list, or a loader with a length"):
        next(pruner.prune(view, iter(in_lockstep), ["0.5"]))
    with pytest.raises(ValueError, match="'chita' needs calibration data"):
        next(pruner.prune(view, None, ["0.5"]))
    ((_, masks),) = pruners.build("chita", epochs=2).prune(view, in_lockstep[:2], ["0.5"])
    assert masks.total - masks.kept == budget("0.5", view.numel), "each step reads the same batches"
    seen = []
    ((_, masks),) = pruner.prune(view, in_lockstep[:2], ["0.5"], progress=lambda b: seen.append(len(b)) or b)
    assert seen == [2] and masks.provenance["rows"] == 2 and masks.provenance["batch_size"] == 3


def test_its_statistic_is_its_own():
    assert ["chita"] in sharing({name: Entry(pruners.build(name)) for name in ("omp", "chita", "snip")})
    assert not pruners.build("chita").plan.one_pass


@pytest.mark.script
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_masks_of_one(tmp_path):
    one = pruned(tmp_path / "one", "chita", "-s", "50")
    script("prune.py", *prune_options(tmp_path / "two", "chita", "-s", "50", "--memory_budget", "0", "--devices", "2"))
    assert mask_files(tmp_path / "two/chita") == mask_files(one)
    two, own = (load_file(folder / FILES[1]) for folder in (tmp_path / "two/chita", one))
    for name, weight in own.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "two/chita").glob("chita_epoch*"))
