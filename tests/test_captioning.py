"""captioning.py and captioning_pretrain.py end to end on two-layer models: dense and with masks, on one process and
two, on public files, misused.
"""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import captioning
import captioning_pretrain
import models
from configs.loading import load_config
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from datasets.tasks import captioning_metrics
from sparsity.masks import Masks
from tests.evaluating import check_evaluation
from tests.processes import PATIENCE, PLAIN, only_bars
from tests.test_scripts import CONFIGS, early, refused, without_torch  # noqa: F401

pytestmark = pytest.mark.script

FILES = {"xvlm": "captioning.yaml", "blip": "blip_captioning.yaml"}
SIZES = {"xvlm": "model.yaml", "blip": "blip_model.yaml"}
CPU = ["--accelerator", "cpu", "--precision", "32-true"]
METRICS = [f"{name}_own_tokens" for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")]
NO_JAVA = PLAIN | {"PATH": ""}


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """Java takes most of the time of a small run; tests/datasets/test_captioning_metrics.py has it."""
    monkeypatch.setattr(captioning_metrics, "has_java", lambda: False)


def options(name, folder, *more, config=None):
    config = config or CONFIGS / FILES[name]
    return ["--model", name, "--config", str(config), "--output_dir", str(folder), *CPU, *more]


def script(*command):
    """A script in a process of its own, without Java; what it printed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=NO_JAVA, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done


def changed(path, source, **values):
    """A configuration with other values."""
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(source).read_text()) | values))
    return path


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """A checkpoint of each pretrained model and a mask of it: name -> (weights, mask), paths."""
    found = {}
    for name, sizes in SIZES.items():
        folder, module = tmp_path_factory.mktemp(name), models.find(name)
        torch.manual_seed(0)
        model = module.build(load_config(CONFIGS / sizes, module.Config))
        torch.save({"model": model.state_dict()}, folder / "w.pth")
        view, generator = module.prunable_view(model), torch.Generator().manual_seed(0)
        masks = {key: torch.rand(w.parameter.shape, generator=generator) < 0.5 for key, w in view.weights.items()}
        aliases = {key: weight.aliases for key, weight in view.weights.items()}
        Masks(masks, {"pruner": "toss", "sparsity": "0.5"}, aliases).save(folder / "m.safetensors")
        found[name] = folder / "w.pth", folder / "m.safetensors"
    return found


def masked(trunks, name):
    weights, mask = trunks[name]
    return ["-pre", str(weights), "--mask", str(mask)]


def zeros(result):
    """Whether all that the mask of a result prunes is zero, and nothing else is."""
    weights, held = load_file(result / "model.safetensors"), Masks.load(result / "mask.safetensors")
    return all((weights[key][~kept] == 0).all() and (weights[key][kept] != 0).all() for key, kept in held.items())


def log_values(folder, name):
    with (folder / "log.csv").open(newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == name]


# captioning.py: what it writes


@pytest.mark.parametrize("name", FILES)
def test_dense(tmp_path, name, capsys, caplog):
    captioning.main(options(name, tmp_path / "out", "--dense"))
    result = tmp_path / "out" / "result"
    metrics = json.loads((result / "metrics.json").read_text())
    assert list(metrics) == ["scenes", "unseen_scenes"] and list(metrics["scenes"]) == METRICS
    files = {"README.md", "config.yaml", "metrics.json", "model.safetensors", "recipe.yaml"}
    assert {path.name for path in result.iterdir()} == files | {f"captions_{split}.json" for split in metrics}
    for split in metrics:
        content = json.loads((result / f"captions_{split}.json").read_text())
        assert [one["image_id"] for one in content] == list(range(12))
        assert all(set(one) == {"image_id", "caption"} and one["caption"] for one in content)
        assert not any("a picture of" in one["caption"] or "[" in one["caption"] for one in content)
    card = (result / "README.md").read_text()
    assert f"# {name}_captioning" in card and "cider_own_tokens" in card
    assert "scenes: bleu_1_own_tokens" in capsys.readouterr().out
    assert len(log_values(tmp_path / "out", "validation/cider_own_tokens")) == 3  # after each epoch


@pytest.mark.parametrize("name", FILES)
def test_with_a_mask(tmp_path, name, trunks):
    captioning.main(options(name, tmp_path / "out", *masked(trunks, name)))
    result, mask = tmp_path / "out" / "result", Masks.load(trunks[name][1])
    assert zeros(result) and "pruner: toss" in (result / "README.md").read_text()
    held, task = Masks.load(result / "mask.safetensors"), models.find_task(name, "captioning")
    expected = {key: kept for old, kept in mask.items() for key in task.task_names(old)}
    assert held.keys() == expected.keys() and all(torch.equal(held[key], kept) for key, kept in expected.items())
    decoder = "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
    assert (load_file(result / "model.safetensors")[decoder] == 0).float().mean() > 0.4


def test_the_loss_goes_down(tmp_path, trunks):
    config = changed(
        tmp_path / "c.yaml",
        CONFIGS / "captioning.yaml",
        optimizer={"lr": 5.0e-3},
        scheduler={"sched": "linear", "epochs": 6},
    )
    captioning.main(options("xvlm", tmp_path / "out", *masked(trunks, "xvlm"), "--skip_eval", config=config))
    losses = log_values(tmp_path / "out", "loss")
    assert losses[-1] < losses[0] - 1


def test_without_evaluation_there_are_captions_and_no_metrics(tmp_path, trunks, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", _without("pycocoevalcap"))
    captioning.main(options("blip", tmp_path / "out", *masked(trunks, "blip"), "--skip_eval"))
    result = tmp_path / "out" / "result"
    assert json.loads((result / "metrics.json").read_text()) == {} and not (tmp_path / "out/best.pt").exists()
    for split in ("scenes", "unseen_scenes"):
        assert len(json.loads((result / f"captions_{split}.json").read_text())) == 12
    assert zeros(result)


def _without(package):
    find = importlib.util.find_spec
    return lambda name, *more: None if name == package else find(name, *more)


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, trunks):
    mask = masked(trunks, "xvlm")
    for folder, flags in (("whole", []), ("parts", ["--incremental"]), ("parts", ["--incremental"]), ("parts", [])):
        captioning.main(options("xvlm", tmp_path / folder, *mask, *flags))
    for name in ("model.safetensors", "metrics.json", "captions_scenes.json"):
        assert (tmp_path / "whole/result" / name).read_bytes() == (tmp_path / "parts/result" / name).read_bytes()


@pytest.mark.parametrize("name", ["xvlm", pytest.param("blip", marks=pytest.mark.slow)])
def test_evaluation_alone(tmp_path, name):
    config = changed(tmp_path / "c.yaml", CONFIGS / FILES[name], scheduler={"epochs": 1})
    check_evaluation(captioning.main, ["--model", name, "--config", str(config), "--dense", *CPU], tmp_path)


# Two processes


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["xvlm", pytest.param("blip", marks=pytest.mark.slow)])
def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path, name, trunks):
    """Evaluated as it is, by ranks that have unequal parts of it; what is left out without Java is said once."""
    config = changed(tmp_path / "c.yaml", CONFIGS / FILES[name], scheduler={"epochs": 0})
    captioning.main(options(name, tmp_path / "1", *masked(trunks, name), config=config))
    given = options(name, tmp_path / "2", *masked(trunks, name), "--devices", "2", config=config)
    printed = script("captioning.py", *given)
    one, two = (tmp_path / devices / "result" for devices in ("1", "2"))
    for file in ("metrics.json", "captions_scenes.json", "captions_unseen_scenes.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    (told,) = (line for line in re.split("[\r\n]", printed.stderr) if "Java" in line)
    assert told.startswith("no Java: METEOR and SPICE are left out") and only_bars(printed.stderr)
    assert printed.stdout.count("cider_own_tokens") == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_losses_do_not_depend_on_the_number_of_processes(tmp_path, trunks):
    """Without dropout: a step of one process has two batches, of two processes one each."""
    sizes = yaml.safe_load((CONFIGS / "model.yaml").read_text())
    sizes["text"]["dropout"] = 0.0
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(sizes))
    values = {"model_config": str(tmp_path / "model.yaml"), "log_every": 1}
    config, mask = changed(tmp_path / "c.yaml", CONFIGS / "captioning.yaml", **values), masked(trunks, "xvlm")
    captioning.main(options("xvlm", tmp_path / "1", *mask, "--skip_eval", config=config))
    script("captioning.py", *options("xvlm", tmp_path / "2", *mask, "--skip_eval", "--devices", "2", config=config))
    one, two = (log_values(tmp_path / devices, "loss") for devices in ("1", "2"))
    assert len(one) == 12 and one[-1] < one[0] - 0.1 and two == pytest.approx(one, rel=1e-5)
    norms = (log_values(tmp_path / devices, "norm") for devices in ("1", "2"))
    assert next(norms) == pytest.approx(next(norms), rel=1e-4)
    assert zeros(tmp_path / "2" / "result")


# captioning_pretrain.py


def test_the_first_stage_and_the_second(tmp_path, trunks, capsys):
    mask = masked(trunks, "xvlm")
    config = CONFIGS / "captioning_pretrain.yaml"
    captioning_pretrain.main(options("xvlm", tmp_path / "first", *mask, config=config))
    result = tmp_path / "first" / "result"
    assert zeros(result) and "# xvlm_captioning_pretrain" in (result / "README.md").read_text()
    assert capsys.readouterr().out == f"results: {result}\n" and len(log_values(tmp_path / "first", "loss")) == 2
    last = tmp_path / "first" / "last.pt"
    flags = ["--load_capt_pretrain", "-pre", str(last), "--mask", str(trunks["xvlm"][1])]
    config = changed(tmp_path / "c.yaml", CONFIGS / "captioning.yaml", scheduler={"epochs": 0})
    captioning.main(options("xvlm", tmp_path / "second", *flags, config=config))
    second = load_file(tmp_path / "second" / "result" / "model.safetensors")
    torch.testing.assert_close(second, torch.load(last, weights_only=True)["model"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_first_stage_on_two_processes(tmp_path, trunks):
    config = CONFIGS / "captioning_pretrain.yaml"
    given = options("xvlm", tmp_path, *masked(trunks, "xvlm"), "--devices", "2", config=config)
    printed = script("captioning_pretrain.py", *given)
    assert zeros(tmp_path / "result") and only_bars(printed.stderr) and printed.stdout.count("results:") == 1


# Files in the public formats


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Files in the layouts of COCO and of the pretraining sets."""
    folder = tmp_path_factory.mktemp("public")
    export_public(folder, 10, load_glyphs(), side=64)
    retrieval, own = folder / "data/finetune/itr", folder / "data/finetune/ic"
    own.mkdir()
    for split in ("train", "val", "test"):
        shutil.copy(retrieval / f"coco_{split}.json", own / f"coco_karpathy_{split}.json")
    for split in ("val", "test"):
        records = json.loads((own / f"coco_karpathy_{split}.json").read_text())
        numbers = [int(re.search(r"(\d+)\.png", record["image"])[1]) for record in records]
        pairs = zip(numbers, records, strict=True)
        captions = [{"image_id": n, "id": 2 * n, "caption": record["caption"][0].title()} for n, record in pairs]
        content = {"images": [{"id": n} for n in numbers], "annotations": captions}
        (own / f"coco_karpathy_{split}_gt.json").write_text(json.dumps(content))
    return folder


def reduced(path, folder, source, size, **more):
    """The configuration of the full size: only sizes, and where things are, are others."""
    config = yaml.safe_load(Path(source).read_text())
    small = {"model_config": str(CONFIGS / size), "weights": "random", "image_res": 48, "max_tokens": 24}
    small |= {"batch_size_train": 2, "batch_size_target": 4, "workers": 1}
    text = yaml.safe_dump(config | small | more)
    path.write_text(re.sub(r"\b(data/(?:finetune|pretrain)|images)/", rf"{folder}/\1/", text))
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_configuration_of_the_full_size(tmp_path, name, public):
    """With positions of its own, for images of 48 pixels, as for 384 after 224."""
    config = reduced(tmp_path / "c.yaml", public, f"configs/{name}/captioning.yaml", SIZES[name])
    captioning.main(options(name, tmp_path / "out", "--dense", "--debug", config=config))
    result = tmp_path / "out" / "result"
    metrics = json.loads((result / "metrics.json").read_text())
    assert list(metrics) == ["test"] and list(metrics["test"]) == METRICS
    content = json.loads((result / "captions_test.json").read_text())
    assert [one["image_id"] for one in content] == list(range(1, 11))
    assert len(log_values(tmp_path / "out", "validation/cider_own_tokens")) == 5


def test_the_first_stage_of_the_full_size(tmp_path, public):
    source = "configs/xvlm/captioning_pretrain.yaml"
    config = reduced(tmp_path / "c.yaml", public, source, "model.yaml")
    captioning_pretrain.main(options("xvlm", tmp_path / "out", "--dense", "--debug", config=config))
    assert (tmp_path / "out/last.pt").is_file() and len(log_values(tmp_path / "out", "loss")) == 1


def test_images_that_cannot_be_read(tmp_path, public, capsys):
    folder = tmp_path / "data"
    shutil.copytree(public, folder)
    broken = sorted((folder / "images/coco/bundled").glob("test_*.png"))[2]
    broken.write_bytes(b"no image")
    config = reduced(tmp_path / "c.yaml", folder, "configs/xvlm/captioning.yaml", "model.yaml", workers=0)
    given = options("xvlm", tmp_path / "out", "--dense", "--debug", config=config)
    assert "skipped.txt: 1 of 10 samples were skipped" in refused(capsys, captioning.main, given)
    captioning.main([*given, "--max_skipped", "0.5"])  # goes on from the snapshot
    assert str(broken) in (tmp_path / "out/skipped.txt").read_text()
    content = json.loads((tmp_path / "out/result/captions_test.json").read_text())
    assert [one["image_id"] for one in content] == list(range(1, 11))
    assert [one["image_id"] for one in content if not one["caption"]] == [3]  # it counts as a wrong one


@pytest.mark.parametrize("missing", ["coco_karpathy_train", "coco_karpathy_val", "coco_karpathy_test_gt"])
def test_annotations_that_are_not_there(tmp_path, public, without_torch, missing):  # noqa: F811
    config = reduced(tmp_path / "c.yaml", public, "configs/xvlm/captioning.yaml", "model.yaml")
    config.write_text(config.read_text().replace(f"{missing}.json", "absent.json"))
    told = early(["captioning.py", *options("xvlm", tmp_path / "out", "--dense", config=config)], without_torch)
    assert "ic/absent.json: annotation file not found; docs/datasets.md says how to get" in told
    assert not (tmp_path / "out").exists()


def test_references_of_other_images_are_refused_before_training(tmp_path, public, capsys):
    config = reduced(tmp_path / "c.yaml", public, "configs/xvlm/captioning.yaml", "model.yaml")
    (tmp_path / "gt.json").write_text(json.dumps({"annotations": [{"image_id": 77, "caption": "a"}]}))
    config = changed(config, config, test_gt_file=str(tmp_path / "gt.json"))
    told = refused(capsys, captioning.main, options("xvlm", tmp_path / "out", "--dense", config=config))
    assert "gt.json: no caption of image 1, which" in told and not (tmp_path / "out").exists()


# Misuse


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give --mask FILE to train a pruned model, or --dense"),
        (["--mask", "nowhere.safetensors"], "--mask nowhere.safetensors: mask file not found"),
        (["--dense", "--devices", "3"], "batch_size_target 8 is no multiple of batch_size_train 4 x 3 devices = 12"),
        (["--dense", "-pre", "nowhere.pth"], "nowhere.pth: weights file not found"),
        (["--dense", "--load_capt_pretrain"], "--load_capt_pretrain needs --pretraining_weights: last.pt of"),
        (["--dense", "--model", "dino"], "there is no captioning with the model 'dino'; there is with: xvlm, blip"),
        (["--dense", "--model", "blip", "--load_capt_pretrain"], "no captioning_pretrain with the model 'blip'"),
        (["--dense", "--config", "absent.yaml"], "absent.yaml: configuration file not found"),
    ],
)
def test_options_that_cannot_be(tmp_path, without_torch, flags, told):  # noqa: F811
    assert told in early(["captioning.py", *options("xvlm", tmp_path / "out", *flags)], without_torch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"max_length": 4}, "max_length must be at least 5, got 4"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ({"train_file": ["a.json"]}, "set bundled, or train_file, val_file, test_file and image_root, not both"),
        ({"bundled": None}, "no data: set train_file, or bundled"),
        ({"bundled": {"train_scenes": 4, "val_scenes": 2, "test_scenes": 2, "test": ["seen"]}}, "got 'seen'"),
        ({"prompts": "a"}, "unknown key 'prompts'; did you mean 'prompt'?"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, without_torch, values, told):  # noqa: F811
    config = changed(tmp_path / "c.yaml", CONFIGS / "captioning.yaml", **values)
    heard = early(["captioning.py", *options("xvlm", tmp_path / "out", "--dense", config=config)], without_torch)
    assert told in heard and str(config) in heard


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max_tokens": 5}, "max_tokens must be above the 5 tokens of the prompt and [SEP], got 5"),
        ({"min_length": 1, "max_length": 4}, "max_length must be above the 4 tokens of the prompt and at most 32"),
        ({"max_length": 33}, "max_length must be above the 4 tokens of the prompt and at most 32 positions, got 33"),
    ],
)
def test_lengths_that_do_not_fit_the_model(tmp_path, capsys, values, told):
    config = changed(tmp_path / "c.yaml", CONFIGS / "captioning.yaml", **values)
    assert told in refused(capsys, captioning.main, options("xvlm", tmp_path / "out", "--dense", config=config))


def test_weights_of_another_stage(tmp_path, trunks, capsys):
    flags = ["--dense", "--load_capt_pretrain", "-pre", str(trunks["xvlm"][0])]
    told = refused(capsys, captioning.main, options("xvlm", tmp_path / "out", *flags))
    assert "w.pth: no text decoder in this file, so it is no checkpoint of captioning_pretrain.py" in told


def test_without_the_package_of_the_metrics(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", _without("pycocoevalcap"))
    told = refused(capsys, captioning.main, options("xvlm", tmp_path / "out", "--dense"))
    assert "captions are scored by pycocoevalcap: pip install pycocoevalcap, or give --skip_eval" in told


# The command lines


@pytest.mark.parametrize("module", [captioning, captioning_pretrain])
def test_the_options_of_the_published_scripts(module):
    short = module.parse(["--model", "xvlm", "-m", "m", "-pre", "w", "-d", "2", "-wdb", "-exp", "name"])
    long = ["--model", "xvlm", "--mask", "m", "--pretraining_weights", "w", "--devices", "2", "--wandb"]
    assert vars(short) == vars(module.parse([*long, "--experiment_name", "name"]))
    assert module.parse(["--model", "xvlm"]).output_dir is None  # named by model, task and mask
    assert captioning.parse(["--model", "xvlm", "--load_capt_pretrain"]).load_capt_pretrain


@pytest.mark.parametrize("name", ["captioning.py", "captioning_pretrain.py"])
def test_help_needs_no_heavy_import_and_names_all_defaults(without_torch, name):  # noqa: F811
    done = subprocess.run([sys.executable, name, "--help"], capture_output=True, text=True, env=without_torch)
    assert done.returncode == 0, done.stderr
    for option in re.split(r"\n  (?=-)", done.stdout)[2:]:
        assert "default" in option or option.startswith("--model"), option
