"""TAMT on XVLM and in the scripts: exact, better than where it starts, each sparsity alone, alone in comparisons."""

import copy
import csv

import pytest
import torch

import compare
import prune
import pruners
from configs.loading import load_config
from engine.pruning.comparison import Entry, sharing
from models.xvlm import model as xvlm
from sparsity.allocation.budget import budget
from sparsity.pattern import NM
from sparsity.run.engine import Measured
from sparsity.run.request import Request
from sparsity.statistics.gradients import batch_generator
from sparsity.statistics.reading import CalibrationPass
from tests.test_scripts import CONFIGS, SMALL, mask_files, no_pictures, prune_options, pruned, same_but_for_sums, script  # noqa: F401

pytestmark = pytest.mark.script

ROUNDS = [2, 2, 2, 2]


@pytest.fixture
def view(small_xvlm):
    return xvlm.prunable_view(small_xvlm)


@pytest.fixture
def in_lockstep(small_batches):
    """Four rounds of a general and a region batch."""
    pairs = zip(small_batches["general"], small_batches["region"], strict=True)
    return [batch for pair in pairs for batch in pair][: sum(ROUNDS)]


def tamt(view, batches, sparsities, *, pattern=None, reads=None, **options):
    """Masks from rounds of two batches."""
    pruner = pruners.build("tamt", **options)

    def reading(epoch):
        def shown(batches):
            if reads is not None:
                reads.append(epoch)
            return batches

        return CalibrationPass(batches, shown, rounds=ROUNDS)

    measured = pruner.measure(view, reading(0))
    return dict(pruner.masks(view, measured, Request(sparsities or (), pattern), reading))


def pruned_of(masks):
    return masks.total - masks.kept


# What it gives


def test_exact_and_the_model_is_what_it_was(view, in_lockstep):
    before = copy.deepcopy(view.model.state_dict())
    for sparsity, masks in tamt(view, in_lockstep, ["0.3", "0.63"], mask_lr=5e-2).items():
        masks.check(view)
        assert pruned_of(masks) == budget(sparsity, view.numel)
        assert masks.provenance["mask_lr"] == 5e-2 and masks.provenance["mask_decay"] == 0.01
    after = view.model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not view.model.training and all(p.grad is None for p in view.model.parameters())


def test_the_trained_mask_is_better_than_the_one_it_starts_from(view, in_lockstep):
    """On its own batches. At a rate that hardly moves the scores it starts as layer-wise magnitude pruning."""

    def loss(masks):
        with torch.no_grad(), masks.applied(view):
            return sum(float(view.loss(batch, batch_generator(0, i))) for i, batch in enumerate(in_lockstep))

    (start,) = tamt(view, in_lockstep, ["0.75"], mask_lr=1e-12).values()
    (trained,) = tamt(view, in_lockstep, ["0.75"], mask_lr=5e-2).values()
    ((_, local),) = pruners.build("localmp").prune(view, None, ["0.75"])
    assert sum(int((start[name] != local[name]).sum()) for name in local) <= len(local)
    assert loss(trained) < loss(start)
    assert any((trained[name] & ~start[name]).any() for name in start), "no pruned weight came back"


def test_each_sparsity_is_trained_alone_on_the_same_batches(view, in_lockstep):
    reads = []
    together = tamt(view, in_lockstep, ["0.3", "0.63", "0.9"], reads=reads, mask_lr=5e-2)
    assert reads == [0, 0, 0]
    for sparsity, masks in together.items():
        (alone,) = tamt(view, in_lockstep, [sparsity], mask_lr=5e-2).values()
        assert alone.digest() == masks.digest()


def test_a_pattern_and_a_pool(view, in_lockstep):
    (masks,) = tamt(view, in_lockstep, None, pattern=NM(2, 4), mask_lr=5e-2).values()
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in masks.values())
    (masks,) = tamt(view, in_lockstep, ["0.63"], pool="group", mask_lr=5e-2).values()
    for names in view.groups.values():
        gone = sum(int((~masks[name]).sum()) for name in names)
        assert gone == budget("0.63", sum(view.weights[name].numel for name in names))


# As a part


def test_batches_of_the_python_call(view, in_lockstep):
    """Each is a step; they are read for each sparsity, and not at all without one."""
    pruner = pruners.build("tamt")
    with pytest.raises(ValueError, match="give a list, or a loader with a length"):
        next(pruner.prune(view, iter(in_lockstep), ["0.5"]))
    with pytest.raises(ValueError, match="'tamt' needs calibration data"):
        next(pruner.prune(view, None, ["0.5"]))
    with pytest.raises(ValueError, match="reads the batches again"):
        next(pruner.masks(view, Measured(), Request(["0.5"])))
    assert pruner.measure(view, CalibrationPass(in_lockstep)) == Measured()
    seen = []
    list(pruner.prune(view, in_lockstep[:2], ["0.5", "0.6"], progress=lambda b: seen.append(len(b)) or b))
    assert seen == [2, 2]
    with pytest.raises(ValueError, match="other scores for each target"):
        dict(pruner.scores(view, Measured()))


def test_nothing_is_shared_with_others():
    chosen = {name: Entry(pruners.build(name)) for name in ("omp", "tamt", "snip")}
    assert ["tamt"] in sharing(chosen)
    assert not chosen["tamt"].plan.one_pass and not pruners.build("itersnip", epochs=2).plan.one_pass
    assert all(pruners.build(name).plan.one_pass for name in ("omp", "snip", "itersnip", "multiflow", "rand"))


@pytest.mark.script
def test_compared_as_pruned(tmp_path, monkeypatch):
    """The rows of a comparison are the masks of prune.py, under every seed."""
    columns = {f"{way}_r{k}": 50.0 for way in ("txt", "img") for k in (1, 5, 10)}
    monkeypatch.setattr("engine.evaluation.retrieval.ZeroShot.__call__", lambda self: columns)
    given = ["--config", str(CONFIGS / "prune.yaml"), "--output_dir", str(tmp_path / "c"), *SMALL]
    model = xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config))
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    rate = ["--mask_lr", "0.1", "--weights", str(tmp_path / "w.pth")]
    compare.main(["-m", "xvlm", "-p", "omp,tamt,snip", "-s", "50,75", "--seeds", "7,8", *given, *rate])
    with (tmp_path / "c/results.csv").open(newline="") as file:
        rows = {(r["sparsity"], r["seed"]): float(r["vision %"]) for r in csv.DictReader(file) if r["pruner"] == "tamt"}
    assert set(rows) == {(s, seed) for s in ("50", "75") for seed in ("7", "8")}
    report = (pruned(tmp_path / "p", "tamt", "-s", "50,75", "--seed", "7", *rate) / "report.md").read_text()
    for sparsity in ("50", "75"):
        line = next(line for line in report.split("\n") if line.startswith(f"| {sparsity} "))
        assert rows[sparsity, "7"] == pytest.approx(float(line.split("|")[2]), abs=0.006)
    assert rows["50", "7"] != rows["50", "8"]


@pytest.mark.script
def test_scores_that_serve_all_sparsities_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="--save_scores: tamt has no scores that serve all sparsities"):
        prune.main(prune_options(tmp_path, "tamt", "--save_scores"))


@pytest.mark.script
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_the_masks_of_one(tmp_path):
    options = ("-s", "50,75", "--mask_lr", "0.1")
    script("prune.py", *prune_options(tmp_path / "two", "tamt", *options, "--devices", "2"))
    one = pruned(tmp_path / "one", "tamt", *options)
    assert mask_files(tmp_path / "two/tamt").keys() == mask_files(one).keys()
    for name in mask_files(one):
        same_but_for_sums(one / name, tmp_path / "two/tamt" / name)
