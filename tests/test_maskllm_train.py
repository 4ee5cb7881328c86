"""maskllm_train.py end to end on two-layer models: what it writes, stopped, on two processes, misused; its recipes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import maskllm_train
import oneshot_pruning_timm
from configs.decoding import Decoding
from datasets.labelled.timm_images import open_images
from engine.training import learning_tasks
from engine.training.learning_tasks import ImageTask
from engine.training.mask_learning import start_from_weights
from models.external.model import prunable_view
from sparsity.errors import UserError
from sparsity.learned.checkpoint import fold
from sparsity.masks import Masks
from sparsity.pattern import NM
from tests.processes import PLAIN
from tests.test_scripts import refused, script

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "test_vit", "--img-size", "32", "--num-classes", "2", "--accelerator", "cpu", "--workers", "0"]
QUICK = ["--batch-size", "4", "--epochs", "2", "--lr", "0.05", "--log-interval", "1"]


pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ with 12 and val/ with 4 images, of two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for brightness, kind in enumerate(("night", "noon")):
            (folder / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (40, 40, 3), dtype=np.uint8) + np.uint8(127 * brightness)
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def view():
    return prunable_view(timm.create_model("test_vit", num_classes=2, img_size=32))


@pytest.fixture(scope="module")
def prior(tmp_path_factory, view):
    """A 2:4 mask file."""
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    torch.manual_seed(0)
    Masks({name: NM(2, 4).keep(torch.randn(weight.shape)) for name, weight in view.weights.items()}).save(path)
    return path


def options(photos, folder, *more):
    return [*TINY, *QUICK, "--data-dir", str(photos), "--output", str(folder), "--experiment", "run", *more]


def learned(photos, folder, *more):
    """Train in this process; the folder of the results."""
    maskllm_train.main(options(photos, folder, *more))
    return folder / "run"


def checkpoint(folder):
    return torch.load(folder / "model_best.pth.tar", weights_only=True)


def losses(folder):
    rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    return [(int(step), float(value)) for step, _, name, value in rows if name == "loss"]


def test_what_it_writes(tmp_path, photos, prior, view):
    folder = learned(
        photos, tmp_path, "--mask-only", "--sparse-checkpoint", str(prior), "--mixup", "0.8", "--clip-grad", "2"
    )
    best, masks, plain = (
        checkpoint(folder),
        Masks.load(folder / "mask.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    masks.check(view)
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())
    assert best["arch"] == "test_vit" and {f"{n.removesuffix('weight')}gate" for n in masks} <= set(best["state_dict"])
    dense = fold(best["state_dict"])
    assert dense.keys() == plain.keys() and all(torch.equal(dense[name], plain[name]) for name in dense)
    for name, mask in masks.items():
        assert torch.equal(plain[name] != 0, mask)
    model = timm.create_model("test_vit", num_classes=2, img_size=32, checkpoint_path=str(folder / "model.safetensors"))
    assert torch.equal(model.blocks[0].attn.qkv.weight, plain["blocks.0.attn.qkv.weight"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["best"]["value"] == metrics["val"]["top1"] == best["metric"]
    assert masks.provenance["method"] == "maskllm" and masks.provenance["pattern"] == "2:4"
    start = timm.create_model("test_vit", num_classes=2, img_size=32)
    assert best["state_dict"].keys() - start.state_dict().keys() == {f"{n.removesuffix('weight')}gate" for n in masks}
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_strong_prior_is_what_is_learned(tmp_path, photos, prior):
    given = ("--sparse-checkpoint", str(prior), "--prior-strength", "1000", "--lr", "1e-6", "--steps", "1")
    folder = learned(photos, tmp_path, "--mask-only", *given)
    assert Masks.load(folder / "mask.safetensors").digest() == Masks.load(prior).digest()
    zeros = folder / "model.safetensors"
    again = learned(photos, tmp_path / "zeros", "--mask-only", *given[2:], "--sparse-checkpoint", str(zeros))
    assert Masks.load(again / "mask.safetensors").digest() == Masks.load(prior).digest()
    gates = folder / "model_best.pth.tar"
    again = learned(photos, tmp_path / "gates", "--mask-only", *given[2:], "--sparse-checkpoint", str(gates))
    assert Masks.load(again / "mask.safetensors").digest() == Masks.load(prior).digest()


def test_it_starts_from_the_masks_and_the_weights_of_alps(tmp_path, photos, view):
    """Weights that the prior prunes can come back with its dense weight; until it does, the model is the pruned one."""
    dense, pruned = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    save_file(model.state_dict(), dense)
    sizes = [*TINY[:6], "--accelerator", "cpu", "--ckpt", str(dense), "--data-path", str(photos), "--nsamples", "8"]
    oneshot_pruning_timm.main([*sizes, "--pruner", "alps", "--skip-eval", "--save-model", str(pruned)])
    alps, before = load_file(pruned), load_file(dense)
    given = ["--mask-only", "--initial-checkpoint", str(dense), "--sparse-checkpoint", str(pruned)]
    given += ["--prior-strength", "1000", "--lr", "1e-6", "--steps", "1"]
    folder = learned(photos, tmp_path / "both", *given, "--prior-weights", str(pruned))
    found, gated = load_file(folder / "model.safetensors"), checkpoint(folder)["state_dict"]
    assert found.keys() == alps.keys() and all(torch.equal(found[name], alps[name]) for name in alps)
    for name in view.weights:
        kept = alps[name] != 0
        assert (alps[name] != before[name])[kept].any(), "ALPS updates what it keeps"
        assert torch.equal(gated[name], torch.where(kept, alps[name], before[name]))
    masks_alone = load_file(learned(photos, tmp_path / "mask", *given) / "model.safetensors")
    assert all(torch.equal(masks_alone[name], before[name] * (alps[name] != 0)) for name in view.weights)


def test_corrected_biases_are_begun_with_too(tmp_path, view, prior):
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    state = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    own, masks = prunable_view(model), Masks.load(prior)
    start_from_weights(tmp_path, own, masks, lambda path: dict(state))
    for name, parameter in model.named_parameters():
        assert (parameter == 2).all() or (name in own.weights and torch.equal(parameter == 2, masks[name])), name
    state.pop("blocks.0.mlp.fc1.weight")
    with pytest.raises(UserError, match=r"it has no blocks\.0\.mlp\.fc1\.weight of this model's shape"):
        start_from_weights(tmp_path, own, masks, lambda path: dict(state))


@pytest.mark.parametrize(
    "more",
    [
        (
            "--mask-only",
            "--model-ema",
            "--model-ema-decay",
            "0.5",
            "--mixup",
            "0.8",
            "--aa",
            "rand-m8-inc1",
            "--reprob",
            "0.3",
        ),
        ("--schedule-unit", "step", "--hard", "--preset", "llm", "--drop-path", "0.2"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, photos, monkeypatch, more):
    whole = learned(photos, tmp_path / "whole", *more)
    loss = ImageTask.loss

    def stopping(self, batch, step):
        if step == 4:
            raise KeyboardInterrupt
        return loss(self, batch, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageTask, "loss", stopping)
        learned(photos, tmp_path / "parts", *more)
    parts = learned(photos, tmp_path / "parts", *more)
    assert losses(parts) == losses(whole)
    last, same = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (parts, whole))
    assert last.keys() == same.keys() and all(torch.equal(last[name], same[name]) for name in last)
    assert (parts / "mask.safetensors").read_bytes() == (whole / "mask.safetensors").read_bytes()


def test_the_moving_average_is_what_is_written(tmp_path, photos):
    folder = learned(photos, tmp_path, "--mask-only", "--model-ema", "--model-ema-decay", "0.9", "--steps", "3")
    state, best = torch.load(folder / "last.pt", weights_only=True)["model"], checkpoint(folder)["state_dict"]
    gate = "blocks.0.mlp.fc1.gate"
    assert torch.equal(best[gate], state[f"average.module.{gate}"]) and not torch.equal(
        best[gate], state[f"model.{gate}"]
    )


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_learn_what_one_does(tmp_path, photos):
    more = [
        "--mask-only",
        "--steps",
        "2",
        "--hflip",
        "0",
        "--scale",
        "1",
        "1",
        "--ratio",
        "1",
        "1",
        "--color-jitter",
        "0",
    ]
    one = learned(photos, tmp_path / "one", *more)
    two = options(photos, tmp_path / "two", *more, "--devices", "2")
    two[two.index("--batch-size") + 1] = "2"
    script("maskllm_train.py", *two)
    for (_, ours), (_, theirs) in zip(losses(one), losses(tmp_path / "two/run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    masks = [Masks.load(folder / "mask.safetensors") for folder in (one, tmp_path / "two/run")]
    differ = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
    assert differ < 1e-3 * masks[0].total  # sums of other order


def test_under_a_fixed_mask_and_without(tmp_path, photos, prior):
    sparse = learned(photos, tmp_path / "a", "--sparsity-mode", "sparse", "--sparse-checkpoint", str(prior))
    weights, masks = load_file(sparse / "model.safetensors"), Masks.load(prior)
    assert all(not weights[name][~mask].any() for name, mask in masks.items())
    dense = learned(photos, tmp_path / "b", "--sparsity-mode", "dense", "--steps", "2")
    assert all(tensor.count_nonzero() for tensor in load_file(dense / "model.safetensors").values())
    assert not (dense / "mask.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "config"), [("dino", "dino_prune"), ("xvlm", "prune"), ("blip", "blip_prune"), ("dit", "dit_prune")]
)
def test_models_of_this_project_learn_on_their_own_loss(tmp_path, model, config):
    given = ["--config", f"tests/data/configs/{config}.yaml", "--num_batches", "2", "--accelerator", "cpu"]
    given += ["--output", str(tmp_path), "--experiment", "run", "--log-interval", "1", "--epochs", "2", "--mask-only"]
    maskllm_train.main(["--model", model, *given])
    masks = Masks.load(tmp_path / "run/mask.safetensors")
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())
    assert len(losses(tmp_path / "run")) == 2 * 2 * (2 if model in ("xvlm", "blip") else 1)  # pairs, regions in turns


def test_the_folder_unless_told_otherwise(tmp_path, photos, prior, monkeypatch):
    """The model, the pattern, the mode and the prior name it: runs that differ in them never meet."""
    monkeypatch.chdir(tmp_path)
    given = [*TINY, "--data-dir", str(photos), "--mask-only"]
    maskllm_train.main([*given, "--batch-size", "4", "--steps", "1", "--sparse-checkpoint", str(prior)])
    folder = Path("output/maskllm/test_vit.2of4.prior")
    assert {"mask.safetensors", "model.safetensors", "metrics.json"} <= {path.name for path in folder.iterdir()}

    def folder_of(*more):
        args = maskllm_train.parse([*given, *more])
        maskllm_train.check(args)
        return args.folder

    others = [[], ["--N", "1"], ["--M", "8"], ["--model", "test_vit2"], ["--sparsity-mode", "dense"]]
    others += [["--sparsity-mode", "sparse", "--sparse-checkpoint", str(prior)]]
    found = [folder, *(folder_of(*more) for more in others)]
    assert found[1:5] == [Path("output/maskllm", name) for name in DEFAULTS] and len(set(found)) == len(found)


DEFAULTS = ("test_vit.2of4", "test_vit.1of4", "test_vit.2of8", "test_vit2.2of4")


def test_images_are_decoded_as_asked(tmp_path, photos, monkeypatch, capsys):
    """Those of 40 x 40 pixels are too large for 1,599."""
    asked = []
    monkeypatch.setattr(
        learning_tasks, "open_images", lambda *a, **given: asked.append(given["decoding"]) or open_images(*a, **given)
    )
    given = ["--exif-rotation", "--transparency", "white", "--max-pixels", "1600", "--steps", "1", "--mask-only"]
    learned(photos, tmp_path / "read", *given)
    assert asked == 2 * [Decoding(exif_rotation=True, transparency="white", max_pixels=1600)]
    given[given.index("1600")] = "1599"
    assert "skipped" in refused(capsys, maskllm_train.main, options(photos, tmp_path / "none", *given))


# What is refused


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--N", "4"], "pattern must be N:M with N weights kept of every M, 1 <= N < M"),
        (["--tau-range", "1", "0"], "tau must be above 0"),
        (["--sparse-checkpoint", "nowhere.pt"], "--sparse-checkpoint nowhere.pt: file not found"),
        (["--sparsity-mode", "sparse"], "give it with --sparse-checkpoint"),
        (["--prior-weights", "nowhere.pt"], "--prior-weights nowhere.pt: file not found"),
        (["--prior-weights", __file__], "--prior-weights are those of a prior: give it with --sparse-checkpoint"),
        (["--data-dir", "nowhere"], "--data-path nowhere: expected a folder with train/ and val/"),
        (["--num-classes", "3"], "the data has 2 classes and the model 3"),
        (["--batch-size", "50"], "--batch-size 50: the training set has 12 images"),
        (["--opt", "nope"], "--opt nope"),
        (["--model", "test_vitt"], "timm has no such model, did you mean"),
        (["--M", "5"], "no layer of this model divides into groups of 5"),
        (["--calibration", "images"], "--calibration is not for classifiers of timm: leave it out with test_vit"),
        (["--model", "xvlm", "--groups", "a=b"], "--groups is for other models"),
        (["--max-pixels", "0"], "--max-pixels"),
        (["--model", "xvlm", "--exif-rotation"], "of xvlm `decoding:` in the configuration says that"),
    ],
)
def test_bad_options(tmp_path, photos, capsys, more, told):
    assert told in refused(capsys, maskllm_train.main, options(photos, tmp_path, "--mask-only", *more))


def test_bad_priors(tmp_path, photos, capsys, prior, view):
    def told(path, *more):
        arguments = options(photos, tmp_path / "out", "--mask-only", "--sparse-checkpoint", str(path), *more)
        return refused(capsys, maskllm_train.main, arguments)

    assert "the prior is not 1:4: it keeps 2 of 4" in told(prior, "--N", "1")
    Masks({"a.weight": torch.ones(4, 4, dtype=torch.bool)}).save(tmp_path / "other.safetensors")
    assert "do not fit this model" in told(tmp_path / "other.safetensors")
    dense = {name: torch.ones(weight.shape) for name, weight in view.weights.items()}
    save_file(dense, tmp_path / "dense.safetensors")
    assert "has no zeros" in told(tmp_path / "dense.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "is of another model" in told(tmp_path / "a.safetensors")


def test_a_checkpoint_with_other_classes(tmp_path, photos, capsys):
    save_file(timm.create_model("test_vit", num_classes=5, img_size=32).state_dict(), tmp_path / "five.safetensors")
    line = refused(
        capsys,
        maskllm_train.main,
        options(photos, tmp_path, "--initial-checkpoint", str(tmp_path / "five.safetensors")),
    )
    assert "has 5 classes, and the model 2" in line


# The recipes

RECIPES = sorted(path.name for path in (ROOT / "scripts").glob("maskllm_*.sh"))
STUB = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def commands(tmp_path):
    """The commands that a script gives."""

    def run(name, *more, **environment):
        log, stub = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        stub.write_text(STUB.format(python=sys.executable, log=str(log)))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        given = {**PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), **environment}
        subprocess.run([ROOT / "scripts" / name, *more], env=given, check=True)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_prune_and_then_learn(name, commands, tmp_path):
    assert os.access(ROOT / "scripts" / name, os.X_OK)
    prune, learn = commands(name)
    first, args = oneshot_pruning_timm.parse(prune[1:]), maskllm_train.parse(learn[1:])
    assert (prune[0], learn[0]) == ("oneshot_pruning_timm.py", "maskllm_train.py")
    assert first.save_model == args.sparse_checkpoint and first.model == args.model and not first.enable_update
    assert f"{args.output.name}.sh" == name and args.experiment == "MaskLLM-4V"
    assert args.prior_weights == (args.sparse_checkpoint if "alps" in name else None)
    assert args.mask_only and args.pretrained and args.model_ema == ("1epoch" not in name)
    if "base" in name:
        assert args.batch_size * args.devices == 512 and args.epochs == (1 if "1epoch" in name else 20)
    first.save_model.parent.mkdir(parents=True)
    first.save_model.touch()
    assert [command[0] for command in commands(name, "--seed", "3")] == ["maskllm_train.py"]


def test_a_recipe_runs_at_debug_sizes(commands, monkeypatch):
    monkeypatch.setattr("engine.evaluation.classification.Accuracy.__call__", lambda self: {"top1": 5.0, "top5": 9.0})
    prune, learn = commands("maskllm.sh", "vit_mini", "magnitude", "short", DEBUG="1")
    oneshot_pruning_timm.main([*prune[1:], "--accelerator", "cpu"])
    maskllm_train.main([*learn[1:], "--accelerator", "cpu"])
    folder = maskllm_train.parse(learn[1:]).output / "MaskLLM-4V"
    assert (folder / "model_best.pth.tar").is_file() and (folder / "mask.safetensors").is_file()
