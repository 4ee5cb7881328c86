"""retrieval.py end to end on the two-layer model, as an example of all scripts that fine-tune: what it writes, under
masks, on one process and two, killed and resumed, misused.
"""

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import models
import retrieval
from configs.loading import load_config
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from engine.options.finetuning import default_folder
from engine.training.loggers import CsvLog
from models.xvlm import model as xvlm
from models.xvlm import retrieval as xvlm_retrieval
from sparsity.masks import Masks
from tests.processes import PATIENCE, only_bars
from tests.test_scripts import CONFIGS, early, refused, script, without_torch  # noqa: F401

pytestmark = pytest.mark.script

KILLS = int(os.environ.get("KILLS", "2"))  # of a run, at random moments
EPOCHS = 8 * KILLS
STEPS = 4 * EPOCHS
HEAVY = (
    "engine.training.finetuning",
    "engine.evaluation.retrieval",
    "lightning.fabric",
    "models.xvlm.retrieval",
)  # what the script imports
CONFIG = CONFIGS / "retrieval.yaml"
CARDS = ("README.md", "config.yaml")  # which say with what command they were made


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A checkpoint of the pretrained model and a mask of it: {"weights", "mask"}, paths."""
    folder = tmp_path_factory.mktemp("trunk")
    torch.manual_seed(0)
    model = xvlm.build(load_config(CONFIGS / "model.yaml", xvlm.Config))
    torch.save({"model": model.state_dict()}, folder / "w.pth")
    view = xvlm.prunable_view(model)
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(w.parameter.shape, generator=generator) > 0.7 for name, w in view.weights.items()}
    Masks(masks, {"pruner": "toss", "sparsity": "0.7", "seed": 42}).save(folder / "mask.safetensors")
    return {"weights": folder / "w.pth", "mask": folder / "mask.safetensors"}


def changed(folder, **change):
    """The configuration with other values, in a file."""
    config = yaml.safe_load(CONFIG.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "changed.yaml").write_text(yaml.safe_dump(config))
    return folder / "changed.yaml"


def options(folder, trunk, *more, config=CONFIG, dense=False):
    kind = ["--dense"] if dense else ["--mask", str(trunk["mask"])]
    given = ["--model", "xvlm", "--config", str(config), "--output_dir", str(folder), *kind]
    return [*given, "-pre", str(trunk["weights"]), "--accelerator", "cpu", "--precision", "32-true", *more]


def tuned(folder, trunk, *more, **kind):
    """Fine-tune in this process; the folder of the results."""
    retrieval.main(options(folder, trunk, *more, **kind))
    return folder / "result"


def zeros(result):
    """Whether all that the mask of a result prunes is zero, and little else."""
    weights, masks = load_file(result / "model.safetensors"), Masks.load(result / "mask.safetensors")
    pruned = all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
    return pruned and all(bool((weights[name][mask] != 0).float().mean() > 0.9) for name, mask in masks.items())


def log_rows(folder):
    with (folder / "log.csv").open(newline="") as file:  # perhaps while a line is being written
        return [(row[0], *row[2:]) for row in csv.reader(file) if len(row) == 4]


@pytest.fixture(scope="module")
def whole(trunk, tmp_path_factory):
    """A run from a process of its own: the folder and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, script("retrieval.py", *options(folder, trunk))


# What it writes


def test_all_files_are_there_and_nothing_else(whole):
    folder, printed = whole
    assert {path.name for path in folder.iterdir()} == {"best.pt", "config.yaml", "last.pt", "log.csv", "result"}
    files = {"README.md", "config.yaml", "mask.safetensors", "metrics.json", "model.safetensors", "recipe.yaml"}
    assert {path.name for path in (folder / "result").iterdir()} == files
    assert printed.stdout.endswith(f"results: {folder}/result\n") and printed.stdout.count("\n") == 3
    assert only_bars(printed.stderr)


def test_the_result_is_pruned_as_the_mask_says(whole, trunk):
    result, masks = whole[0] / "result", Masks.load(trunk["mask"])
    assert zeros(result)
    own = Masks.load(result / "mask.safetensors")
    assert own.provenance == masks.provenance
    for name, mask in masks.items():
        (renamed,) = xvlm_retrieval.task_names(name)
        assert torch.equal(own[renamed], mask)
    sizes = load_config(CONFIGS / "model.yaml", xvlm.Config)
    model = xvlm_retrieval.build(sizes, result / "model.safetensors")  # what was written is what is read
    own.check(xvlm_retrieval.prunable_view(model))


def test_the_model_card_says_it_all(whole, trunk):
    card = (whole[0] / "result" / "README.md").read_text()
    metrics = json.loads((whole[0] / "result" / "metrics.json").read_text())
    assert list(metrics) == ["scenes", "unseen_scenes"]
    for told in (f"- base model: {trunk['weights']}", "- pruner: toss", "- task: xvlm_retrieval", "## Metrics: scenes"):
        assert told in card
    assert f"| r_mean     | {metrics['unseen_scenes']['r_mean']:5.1f} |" in card
    assert re.search(r"\| all +\| +\d+ \| +36864 \| +70\.\d \|", card)
    assert f"python retrieval.py --model xvlm --config {CONFIG}" in card


def test_the_log(whole):
    rows = log_rows(whole[0])
    names = {name for _, name, _ in rows[1:]}
    assert {"loss", "itc", "itm", "lr", "norm", "validation/r_mean"} <= names
    steps = {int(step) for step, name, _ in rows[1:] if name == "validation/r_mean"}
    assert steps == {4, 8, 12}, "30 scenes make 4 steps of 8, in 3 epochs"
    rates = [float(value) for _, name, value in rows[1:] if name == "lr"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-4 < rates[0] <= 1e-3


def test_the_best_epoch_is_the_result(whole):
    folder, _ = whole
    rows = [(int(step), float(value)) for step, name, value in log_rows(folder)[1:] if name == "validation/r_mean"]
    step = max(rows, key=lambda row: (row[1], -row[0]))[0]
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["step"] == step
    assert f"- weights of epoch: {step / 4}" in (folder / "result" / "README.md").read_text()
    result = load_file(folder / "result" / "model.safetensors")
    torch.testing.assert_close(result, {k: v for k, v in best["model"].items()}, rtol=0, atol=0)


def test_a_finished_run_is_left_as_it_is(whole, trunk, capsys):
    folder, printed = whole
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.evaluation.retrieval.ZeroShot.__call__", None)  # nothing is evaluated
        tuned(folder, trunk)
    said = "this run is finished; --evaluate evaluates it again\n"
    assert capsys.readouterr().out == said + printed.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    tuned(folder, trunk, "--evaluate")
    assert capsys.readouterr().out == printed.stdout
    assert {path: path.read_bytes() for path in before if path.name not in CARDS} == {
        path: content for path, content in before.items() if path.name not in CARDS
    }


def test_evaluation_alone(whole, trunk, tmp_path, capsys):
    """Evaluate a fine-tuned checkpoint, in a folder without a run, and the pretrained one under a mask."""
    folder, printed = whole
    given = ["--model", "xvlm", "--config", str(CONFIG), "--accelerator", "cpu", "--precision", "32-true", "--evaluate"]
    weights = str(folder / "result" / "model.safetensors")
    retrieval.main([*given, "-pre", weights, "--output_dir", str(tmp_path / "alone")])
    assert capsys.readouterr().out.splitlines()[:2] == printed.stdout.splitlines()[:2]
    assert not (tmp_path / "alone" / "last.pt").exists() and not (tmp_path / "alone" / "log.csv").exists()
    pruned = ["-m", str(trunk["mask"]), "-pre", str(trunk["weights"])]
    retrieval.main([*given, *pruned, "--output_dir", str(tmp_path / "m")])
    assert zeros(tmp_path / "m" / "result")
    with pytest.raises(ValueError, match="another configuration"):  # the run there has other weights
        retrieval.main([*given, "-pre", weights, "--output_dir", str(folder)])
    with pytest.raises(ValueError, match="--evaluate only evaluates"):
        retrieval.main([*given, "--skip_eval"])


def test_other_contents_under_the_same_names_are_another_run(tmp_path, trunk, public):
    folder, _ = public
    arguments = public_options(tmp_path, public, trunk, "--debug", "--skip_eval", "--incremental")
    retrieval.main(arguments)
    file = Path(public[1]["val_file"])
    before = file.read_text()
    try:
        file.write_text(before + " ")
        with pytest.raises(ValueError, match=rf"another configuration \(contents.{file}.bytes \d+ -> \d+"):
            retrieval.main(arguments)
    finally:
        file.write_text(before)
    retrieval.main(arguments)


def test_default_folders_say_model_task_and_mask():
    config, mask = Path("configs/xvlm/retrieval_mini.yaml"), Path("x/xvlm_omp_63_seed42_pruning_masks.safetensors")
    assert default_folder("xvlm", "retrieval", config, mask) == Path("output/xvlm_retrieval_mini/xvlm_omp_63_seed42")
    assert default_folder("blip", "vqa", Path("my.yaml"), None) == Path("output/blip_vqa_my/dense")


def test_the_dense_model(tmp_path, trunk):
    result = tuned(tmp_path, trunk, "--mask", str(trunk["mask"]), dense=True)  # --dense overrides --mask
    assert not (result / "mask.safetensors").exists() and "the model is dense" in (result / "README.md").read_text()
    weights = load_file(result / "model.safetensors")
    assert all((t != 0).float().mean() > 0.99 for name, t in weights.items() if name.endswith("query.weight"))


def test_without_evaluation_the_last_weights_are_the_result(tmp_path, trunk):
    result = tuned(tmp_path, trunk, "--skip_eval")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.testing.assert_close(load_file(result / "model.safetensors"), last["model"], rtol=0, atol=0)
    assert json.loads((result / "metrics.json").read_text()) == {} and not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_other_precisions(tmp_path, trunk, precision):
    assert zeros(tuned(tmp_path, trunk, "--precision", precision, "--debug"))


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path, trunk):
    plain = tuned(tmp_path / "plain", trunk, "--skip_eval")
    config = changed(tmp_path, gradient_checkpointing=True, workers=1)
    other = tuned(tmp_path / "other", trunk, "--skip_eval", config=config)
    assert (plain / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_sgd_and_a_cosine(tmp_path, trunk):
    config = changed(tmp_path, optimizer={"opt": "sgd", "lr": 0.01, "min_lr": 0.001}, scheduler={"sched": "cosine"})
    assert zeros(tuned(tmp_path / "out", trunk, "--skip_eval", config=config))


# Stopped and resumed


def test_one_epoch_at_a_time(tmp_path, trunk, whole, capsys):
    for epoch in (1, 2):
        retrieval.main(options(tmp_path, trunk, "--incremental"))
        told = f"epoch {epoch} of 3 is done; the same command does the next\n"
        assert capsys.readouterr().out == told and not (tmp_path / "result").exists()
    retrieval.main(options(tmp_path, trunk, "--incremental"))
    weights = "result/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole[0] / weights).read_bytes()


def test_a_snapshot_of_ones_own(tmp_path, trunk, whole):
    snapshot = tmp_path / "snapshots" / "mine.pt"
    retrieval.main(options(tmp_path / "out", trunk, "--incremental", "--snapshot", str(snapshot)))
    assert snapshot.is_file() and not (tmp_path / "out" / "last.pt").exists()
    result = tuned(tmp_path / "out", trunk, "--snapshot", str(snapshot))
    assert (result / "model.safetensors").read_bytes() == (whole[0] / "result" / "model.safetensors").read_bytes()


def longer(folder):
    """A run that is long enough, with a snapshot after every second step."""
    return changed(folder, scheduler={"epochs": EPOCHS}, save_every=2, log_every=1)


def train(arguments, said, held):
    """In a process of its own, which never ends by itself: at the last step it waits to be killed."""
    torch.set_num_threads(1)
    sys.stderr, write = said.open("w"), CsvLog.write

    def write_or_hold(self, step, values):
        if step == STEPS:
            held.touch()
            signal.pause()
        write(self, step, values)

    CsvLog.write = write_or_hold
    retrieval.main(arguments)


def killed(arguments, folder, rng):
    """Start a run, and kill it at a random moment once it does steps. Its checkpoints can be read then."""
    before = len(log_rows(folder)) if (folder / "log.csv").is_file() else 0
    context, said = multiprocessing.get_context("forkserver"), folder.with_name("stderr.txt")
    held = folder.with_name("held")
    held.unlink(missing_ok=True)
    context.set_forkserver_preload([__name__, *HEAVY])  # imported once for all processes
    process = context.Process(target=train, args=(arguments, said, held))
    process.start()
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < deadline and not held.exists():
        if (folder / "log.csv").is_file() and len(log_rows(folder)) > before + 5:
            time.sleep(rng.uniform(0, 0.4))
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, said.read_text()[-2000:]
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path, trunk):
    """`KILLS=20 python -m pytest tests/test_finetuning.py -k killed` does it more often."""
    config, rng = longer(tmp_path), random.Random(KILLS)
    torch.set_num_threads(1)  # as in the processes that are killed: sums depend on it
    whole = tuned(tmp_path / "whole", trunk, config=config)
    cut = tmp_path / "cut"
    arguments = options(cut, trunk, config=config)
    for _ in range(KILLS):
        killed(arguments, cut, rng)
    result = tuned(cut, trunk, config=config)
    for name in ("model.safetensors", "mask.safetensors", "metrics.json"):
        assert (result / name).read_bytes() == (whole / name).read_bytes()
    assert log_rows(cut) == log_rows(tmp_path / "whole")
    assert {path.name for path in cut.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


# Two processes


@pytest.mark.multiprocess
def test_two_processes(tmp_path, trunk):
    printed = script("retrieval.py", *options(tmp_path, trunk, "-d", "2"))
    assert zeros(tmp_path / "result") and only_bars(printed.stderr)
    assert printed.stdout.count("results:") == 1
    rows = log_rows(tmp_path)
    assert len(rows) == len(set(rows)), "one process writes the log"
    with pytest.raises(ValueError, match="devices 2 -> 1"):
        tuned(tmp_path, trunk)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path, trunk):
    config = changed(tmp_path, scheduler={"epochs": 0}, batch_size_train=2)  # evaluated as it is
    one = tuned(tmp_path / "one", trunk, config=config)
    script("retrieval.py", *options(tmp_path / "two", trunk, "-d", "2", config=config))
    assert (tmp_path / "two/result/metrics.json").read_bytes() == (one / "metrics.json").read_bytes()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_under_torchrun(tmp_path, trunk):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script(*launcher, "retrieval.py", *options(tmp_path, trunk, "-d", "2", "--debug", "--skip_eval"))
    assert zeros(tmp_path / "result")


# Files in the public layout


@pytest.fixture(scope="module")
def public(tmp_path_factory, trunk):
    """The full-size configuration, with only the sizes reduced, on small files in the COCO layout."""
    folder = tmp_path_factory.mktemp("public")
    export_public(folder, 12, load_glyphs(), side=64)
    config = yaml.safe_load(Path("configs/xvlm/retrieval.yaml").read_text())
    for name in ("val_file", "test_file", "image_root"):
        config[name] = str(folder / config[name])
    config["train_file"] = [str(folder / file) for file in config["train_file"]]
    config |= {"model_config": str(CONFIGS / "model.yaml"), "image_res": 48, "max_tokens": 16, "workers": 1}
    config |= {"batch_size_train": 2, "batch_size_target": 4}
    config["scheduler"]["epochs"] = 2
    return folder, config


def public_options(tmp_path, public, trunk, *more, **change):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(public[1] | change))
    return options(tmp_path / "out", trunk, *more, config=tmp_path / "c.yaml")


def test_the_full_size_configuration(tmp_path, trunk, public):
    """With positions interpolated from 32 to 48 pixels, as it does from 224 to 384."""
    retrieval.main(public_options(tmp_path, public, trunk, "--debug"))
    result = tmp_path / "out" / "result"
    assert zeros(result) and list(json.loads((result / "metrics.json").read_text())) == ["test"]
    assert load_file(result / "model.safetensors")["vision_encoder.pos_embed.weight"].shape[0] == 1 + 3 * 3
    assert max(int(step) for step, *_ in log_rows(tmp_path / "out")[1:]) == 2 * 3, "12 pairs make 3 steps of 4"


def test_debug_does_a_few_steps_of_an_epoch(tmp_path, trunk, public):
    arguments = public_options(
        tmp_path, public, trunk, "--debug", "--skip_eval", batch_size_train=1, batch_size_target=1
    )
    retrieval.main(arguments)
    assert max(int(step) for step, *_ in log_rows(tmp_path / "out")[1:]) == 2 * 4


def test_images_that_cannot_be_read(tmp_path, trunk, public, capsys):
    folder = tmp_path / "data"
    export_public(folder, 12, load_glyphs(), side=64)
    config = json.loads(json.dumps(public[1]).replace(str(public[0]), str(folder)))
    broken = sorted((folder / "images/coco/bundled").glob("0*.png"))[0]
    broken.write_bytes(b"no image")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"workers": 0}))
    given = options(tmp_path / "out", trunk, "--skip_eval", config=tmp_path / "c.yaml")
    assert "1 of 12 samples were skipped" in refused(capsys, retrieval.main, given)
    listed = tmp_path / "out/skipped.txt"
    listed.write_text("of/an/earlier/run.jpg\tgone\n")
    (tmp_path / "out/last.pt").unlink(missing_ok=True)  # a fresh run
    retrieval.main([*given, "--max_skipped", "0.5"])
    (line,) = listed.read_text().splitlines()
    assert line.startswith(f"{broken}\t") and zeros(tmp_path / "out/result")
    listed.write_text("of/the/first/half.jpg\tgone\n")
    retrieval.main([*given, "--max_skipped", "0.5"])  # goes on from the snapshot
    assert listed.read_text().startswith("of/the/first/half.jpg")


# Bad input: one line, exit code 2, nothing written


def write(folder, name, **change):
    """The test's configuration with other values or, where None, without these."""
    config = yaml.safe_load(CONFIG.read_text()) | change
    (folder / name).write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return str(folder / name)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give --mask FILE to train a pruned model, or --dense to train the dense one"),
        (["--mask", "absent.safetensors"], "--mask absent.safetensors: mask file not found"),
        (["--dense", "--model", "xvml"], "no model 'xvml', did you mean 'xvlm'?"),
        (["--dense", "-pre", "absent.pth"], "absent.pth: weights file not found; give --pretraining_weights PATH"),
        (["--dense", "--config", "absent.yaml"], "absent.yaml: configuration file not found"),
        (["--dense", "-d", "3"], "batch_size_target 8 is no multiple of batch_size_train 4 x 3 devices = 12"),
        (["--dense", "--output_dir", "README.md"], "--output_dir README.md: "),
        (["--dense", "--snapshot", "README.md/last.pt"], "--snapshot README.md: "),
        (["--dense", "--precision", "16"], "--precision: invalid choice: '16'"),
        (["--dense", "--weights", "w"], "w: weights file not found"),
        (["--dense", "--seed", "-1"], "--seed: expected an integer from 0 to 2^32 - 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_before_heavy_imports(tmp_path, without_torch, given, told):  # noqa: F811
    first = ["--model", "xvlm", "--config", str(CONFIG), "--output_dir", str(tmp_path / "out")]
    assert told in early(["retrieval.py", *first, *given], without_torch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_size_target": 6}, "c.yaml: batch_size_target 6 is no multiple of batch_size_train 4 x 1 device = 4"),
        ({"batch_size_train": 0}, "batch_size_train must be at least 1, got 0"),
        ({"optimizer": {"lr": 1e-3, "opt": "adam"}}, "opt must be one of adamW, sgd, got 'adam'"),
        ({"optimizer": {"learning_rate": 1e-3}}, "unknown key 'learning_rate'"),
        ({"scheduler": {"epochs": 1, "num_warmup_steps": 5}}, "num_warmup_steps is a share from 0 to 1 of all steps"),
        ({"scheduler": {"epochs": 1, "sched": "step"}}, "sched must be one of linear, cosine, got 'step'"),
        ({"bundled": None}, "c.yaml: no data: set train_file, or bundled"),
        ({"train_file": ["a.json"]}, "set bundled, or train_file, val_file, test_file and image_root, not both"),
        ({"bundled": {"train_scenes": 9, "val_scenes": 9, "test_scenes": 9, "test": ["x"]}}, "bundled.test must be of"),
        ({"model_config": "absent.yaml"}, "absent.yaml: configuration file not found"),
        ({"epochs": 3}, "unknown key 'epochs'"),
    ],
)
def test_bad_configurations(tmp_path, without_torch, change, told):  # noqa: F811
    first = ["--model", "xvlm", "--dense", "--output_dir", str(tmp_path / "out")]
    assert told in early(["retrieval.py", *first, "--config", write(tmp_path, "c.yaml", **change)], without_torch)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("missing", ["train_file", "val_file", "test_file", "image_root"])
def test_data_that_is_not_there(tmp_path, trunk, public, without_torch, missing):  # noqa: F811
    absent = ["absent.json"] if missing == "train_file" else "absent"
    arguments = public_options(tmp_path, public, trunk, **{missing: absent})
    assert re.search(
        r"absent(\.json)?: (annotation file|image folder) not found", early(["retrieval.py", *arguments], without_torch)
    )
    assert not (tmp_path / "out").exists()


def test_annotations_without_images_or_captions(tmp_path, trunk, public, capsys):
    for name, records, told in (
        ("a.json", [{"image": "1.jpg", "caption": "a cat"}], "none of 1 images of"),
        ("b.json", [{"image": "1.jpg"}], "b.json: record 0: no key 'caption'"),
        ("c.json", [], "c.json: no record in this file"),
    ):
        (tmp_path / name).write_text(json.dumps(records))
        arguments = public_options(tmp_path, public, trunk, train_file=[str(tmp_path / name)])
        assert told in refused(capsys, retrieval.main, arguments)
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_model(tmp_path, trunk, capsys):
    other = Masks({name + "x": mask for name, mask in Masks.load(trunk["mask"]).items()})
    other.save(tmp_path / "other.safetensors")
    told = refused(capsys, retrieval.main, options(tmp_path / "out", trunk | {"mask": tmp_path / "other.safetensors"}))
    first = "vision_encoder.encoder.layers.0.self_attn.k_proj.weight"
    assert f"{tmp_path}/other.safetensors: the masks do not fit this model" in told
    assert f"missing: {first}" in told and f"unknown: {first}x" in told
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_another_configuration(tmp_path, trunk, capsys):
    tuned(tmp_path / "out", trunk, "--debug", "--skip_eval")
    before = (tmp_path / "out/last.pt").read_bytes()
    config = changed(tmp_path, optimizer={"lr": 0.5})
    told = refused(capsys, retrieval.main, options(tmp_path / "out", trunk, "--debug", "--skip_eval", config=config))
    assert "training.optimizer.lr 0.001 -> 0.5" in told
    told = refused(capsys, retrieval.main, options(tmp_path / "out", trunk, "--debug", "--skip_eval", dense=True))
    assert "last.pt: belongs to a run of another configuration (mask " in told
    assert (tmp_path / "out/last.pt").read_bytes() == before
    free = changed(tmp_path, workers=1, log_every=3)  # what does not change the result may change
    retrieval.main(options(tmp_path / "out", trunk, "--debug", "--skip_eval", config=free))


def test_a_logger_that_is_not_installed(tmp_path, trunk, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(models, "check_task", lambda *_: None)
    told = refused(capsys, retrieval.main, options(tmp_path / "out", trunk, "-wdb"))
    assert "--wandb needs a package that is not installed: pip install wandb" in told
    assert not (tmp_path / "out").exists()


# The command line


def test_the_options_of_the_published_script():
    short = retrieval.parse(["--model", "xvlm", "-m", "m", "-pre", "w", "-d", "2", "-wdb", "-exp", "name"])
    long = ["--model", "xvlm", "--mask", "m", "--pretraining_weights", "w", "--devices", "2", "--wandb"]
    assert vars(short) == vars(retrieval.parse([*long, "--experiment_name", "name"]))
    assert (short.mask, short.weights, short.devices, short.experiment_name) == (Path("m"), "w", 2, "name")
    flags = ["--dense", "--skip_eval", "--incremental", "--debug", "--wdb_offline"]
    args = retrieval.parse(["--model", "xvlm", "--snapshot", "s", "--seed", "7", "--output_dir", "o", *flags])
    assert all(getattr(args, flag.strip("-")) for flag in flags)
    defaults = retrieval.parse(["--model", "xvlm"])
    assert (defaults.seed, defaults.precision, defaults.devices) == (42, "bf16-mixed", 1)


def test_help_needs_no_heavy_import_and_names_all_defaults(without_torch):  # noqa: F811
    command = [sys.executable, "retrieval.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    for option in re.split(r"\n  (?=-)", done.stdout)[2:]:
        assert "default" in option or option.startswith("--model"), option
