"""Gradual pruning, distillation and sparse LoRA in the scripts that fine-tune, on two-layer models: what they write,
killed and resumed, on two processes, misused.
"""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import captioning
import captioning_pretrain
import image_classification
import retrieval
import vqa
from engine.options.finetuning import default_folder
from engine.options.sparse_training import sparse_options
from engine.training.fit import Run
from sparsity.masks import Masks
from tests.processes import only_bars
from tests.test_finetuning import log_rows
from tests.test_scripts import CONFIGS, early, refused, script, without_torch  # noqa: F401

pytestmark = pytest.mark.script

SCRIPTS = {
    "retrieval": retrieval,
    "captioning": captioning,
    "captioning_pretrain": captioning_pretrain,
    "vqa": vqa,
    "image_classification": image_classification,
}
METHODS = {
    "gradual": "--gradual 75 --prune_every 1",
    "pattern": "--gradual 2:4 --prune_every 2",
    "regrow": "--gradual 75 --gradual_score localmp --prune_every 2 --regrow",
    "distill": "--distill 0.5",
    "lora": "--lora 2",
    "all": "--gradual 75 --prune_every 2 --distill 0.5 --lora 2",
}
CONFIG = CONFIGS / "dino_image_classification.yaml"


class Killed(BaseException):
    pass


def options(folder, method, *more, config=CONFIG):
    given = ["--config", str(config), "--output_dir", str(folder), "--accelerator", "cpu", "--precision", "32-true"]
    return [*given, *("--dense", *METHODS[method].split(), *more)]


def tuned(folder, method, *more, **kind):
    image_classification.main(options(folder, method, *more, **kind))
    return folder / "result"


def written(folder, **change):
    """The configuration with other values, in a file."""
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | change))
    return folder / "c.yaml"


def check_zeros(path, masks):
    """Exactly what the mask prunes is zero, but for weights that happen to be."""
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)["model"]
    for name, mask in masks.items():
        assert bool((weights[name][~mask] == 0).all()) and bool((weights[name][mask] != 0).float().mean() > 0.99)


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, method, monkeypatch):
    """Killed after the third checkpoint and after the sixth, between two steps and before a validation."""
    config = written(tmp_path, save_every=1)
    whole = tuned(tmp_path / "whole", method, config=config)
    save, saved = Run.save, []

    def save_and_die(self, *args, **more):
        save(self, *args, **more)
        saved.append(args[0])
        if len(saved) in (3, 6):
            raise Killed

    monkeypatch.setattr(Run, "save", save_and_die)
    for _ in range(2):
        with pytest.raises(Killed):
            tuned(tmp_path / "cut", method, config=config)
    result = tuned(tmp_path / "cut", method, config=config)
    assert saved[2] < saved[5] < saved[-1]
    for name in ("model.safetensors", "metrics.json", *(["mask.safetensors"] if "gradual" in METHODS[method] else [])):
        assert (result / name).read_bytes() == (whole / name).read_bytes()
    assert log_rows(tmp_path / "cut") == log_rows(tmp_path / "whole")


@pytest.mark.parametrize("method", ["gradual", "regrow", "all"])
def test_the_result_has_exactly_the_sparsity(tmp_path, method, capsys):
    result = tuned(tmp_path, method)
    masks = Masks.load(result / "mask.safetensors")
    count = int(0.75 * masks.total) if method != "regrow" else sum(int(0.75 * m.numel()) for m in masks.values())
    assert masks.total - masks.kept == count
    for path in (result / "model.safetensors", tmp_path / "last.pt", tmp_path / "best.pt"):
        check_zeros(path, masks)
    rows = [float(value) for _, name, value in log_rows(tmp_path) if name == "sparsity"]
    assert rows == sorted(rows) and rows[-1] == pytest.approx(0.75, abs=1e-3) and rows[0] < 0.5
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == last["step"] == 8, "under the last mask"
    card = (result / "README.md").read_text()
    assert "- gradual: 0.75 by" in card and "- sparse\n" in card and f"- pruner: {masks.provenance['pruner']}" in card
    if method == "all":
        assert "- distill: 0.5 of the loss" in card and "- lora: rank 2, merged" in card
    before = {path: path.read_bytes() for path in (tmp_path / "last.pt", result / "model.safetensors")}
    capsys.readouterr()
    tuned(tmp_path, method, "--evaluate")  # the same run, and nothing is trained
    assert "results:" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["regrow", "all"])
def test_two_processes_give_what_one_gives(tmp_path, method):
    """But for the order of sums: the samples of a step are the same ones."""
    more = ("--skip_eval", "--epochs", "1")
    printed = script("image_classification.py", *options(tmp_path / "two", method, *more, "-d", "2"))
    assert only_bars(printed.stderr)
    one = load_file(tuned(tmp_path / "one", method, *more) / "model.safetensors")
    two = load_file(tmp_path / "two" / "result" / "model.safetensors")
    masks = Masks.load(tmp_path / "two" / "result" / "mask.safetensors")
    check_zeros(tmp_path / "two" / "result" / "model.safetensors", masks)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.multiprocess
def test_what_the_task_alone_reads_gets_no_gradient_on_two_processes(tmp_path):
    """The temperature of retrieval, which its teacher does not know of."""
    given = options(tmp_path, "distill", "--distill", "1", "--debug", "--skip_eval", config=CONFIGS / "retrieval.yaml")
    script("retrieval.py", "--model", "xvlm", "-pre", "random", *given, "-d", "2")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert float(last["model"]["temp"]) == pytest.approx(0.07)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["regrow", "all"])
def test_on_an_accelerator(tmp_path, method, precision):
    result = tuned(tmp_path, method, "--accelerator", "gpu", "--precision", precision, "--skip_eval")
    check_zeros(result / "model.safetensors", Masks.load(result / "mask.safetensors"))


def test_a_run_of_another_kind_is_not_gone_on_with(tmp_path):
    tuned(tmp_path, "gradual", "--incremental")
    with pytest.raises(ValueError, match="another configuration .*sparse training"):
        tuned(tmp_path, "regrow")
    with pytest.raises(ValueError, match="another configuration .*sparse training"):
        tuned(tmp_path, "all")


def test_from_a_mask_and_with_the_teacher_of_another_run(tmp_path):
    """A pruned model becomes sparser, learns from images alone, and keeps the zeros that it had."""
    dense, first = tmp_path / "dense", tmp_path / "first"
    tuned(dense, "distill", "--skip_eval")
    result = tuned(first, "gradual", "--skip_eval")
    teacher = dense / "result" / "model.safetensors"
    given = options(tmp_path / "more", "distill", "--distill", "1", "--teacher", str(teacher), "--gradual", "90")
    given = [*given, "--skip_eval", "--mask", str(result / "mask.safetensors"), "-pre", str(teacher)]
    image_classification.main([word for word in given if word != "--dense"])
    masks = Masks.load(tmp_path / "more" / "result" / "mask.safetensors")
    before = Masks.load(result / "mask.safetensors")
    assert masks.total - masks.kept == int(0.9 * masks.total)
    assert all(bool((before[name] | ~mask).all()) for name, mask in masks.items())
    check_zeros(tmp_path / "more" / "result" / "model.safetensors", masks)
    names = {name for _, name, _ in log_rows(tmp_path / "more")[1:]}
    assert {"loss", "distill"} <= names and "task" not in names
    config = (tmp_path / "more" / "result" / "config.yaml").read_text()
    assert f"teacher: {teacher}" in config


VLM = [(name, model) for name in SCRIPTS for model in ("xvlm", "blip") if name != "image_classification"]


@pytest.mark.parametrize(("name", "model"), [pair for pair in VLM if pair != ("captioning_pretrain", "blip")])
def test_every_script(tmp_path, name, model):
    config = CONFIGS / (f"{name}.yaml" if model == "xvlm" else f"blip_{name}.yaml")
    given = ["--model", model, "-pre", "random", *options(tmp_path, "all", "--debug", "--skip_eval", config=config)]
    SCRIPTS[name].main(given)
    masks = Masks.load(tmp_path / "result" / "mask.safetensors")
    assert masks.total - masks.kept == int(0.75 * masks.total)
    check_zeros(tmp_path / "result" / "model.safetensors", masks)
    assert json.loads((tmp_path / "result" / "metrics.json").read_text()) == {}
    assert {"task", "distill", "sparsity"} <= {row for _, row, _ in log_rows(tmp_path)}


# Options


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_parses(name):
    given = "--model xvlm --dense --gradual 80 --distill 0.5 --lora 8"
    args = SCRIPTS[name].parse(given.split())
    found = sparse_options(args)
    assert found.name == "gradual80_distill0.5_lora8" and found.gradual.until == 0.7
    folder = default_folder("xvlm", name, CONFIGS / "x.yaml", None, found.name)
    assert folder.name == "dense_gradual80_distill0.5_lora8"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--gradual 75 --evaluate", "--evaluate trains nothing, and no run with --gradual is there to evaluate"),
        ("--lora 4 --regrow --gradual 75", "leave out --regrow, or --lora"),
        ("--prune_until 0.5", "--prune_until is for --gradual SPARSITY: give that, or leave it out"),
        ("--regrow", "--regrow is for --gradual SPARSITY"),
        ("--gradual 75 --prune_from 0.8", "--prune_from 0.8 is after --prune_until 0.7"),
        ("--gradual 75,90", "expected one sparsity, got '75,90'"),
        ("--gradual 100", "a sparsity is a percentage from 1 to 99.99"),
        ("--gradual 4:2", "pattern must be N:M"),
        ("--distill 0", "--distill: expected a number above 0, at most 1, got '0'"),
        ("--distill 1.5", "expected a number above 0, at most 1"),
        ("--teacher README.md", "--teacher is for --distill W: give that, or leave it out"),
        ("--distill 0.5 --teacher absent.pt", "--teacher absent.pt: there is no such file"),
        ("--lora 0", "--lora: expected an integer of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_heavy_imports(tmp_path, without_torch, given, told):  # noqa: F811
    first = ["--config", str(CONFIG), "--output_dir", str(tmp_path / "out"), "--dense"]
    assert told in early(["image_classification.py", *first, *given.split()], without_torch)
    assert not list(tmp_path.iterdir())


def test_a_new_head_has_no_teacher(tmp_path, capsys):
    given = options(tmp_path, "distill", "--distill", "1")
    assert "give --teacher FILE, or --distill below 1" in refused(capsys, image_classification.main, given)
