"""vqa.py end to end on two-layer models: dense and with masks, on one process and two, on public files, misused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import models
import vqa
from configs.loading import load_config
from sparsity.masks import Masks
from tests.evaluating import check_evaluation
from tests.test_scripts import CONFIGS, script

pytestmark = pytest.mark.script

FILES = {"xvlm": "vqa.yaml", "blip": "blip_vqa.yaml"}
SIZES = {"xvlm": "model.yaml", "blip": "blip_model.yaml"}
CPU = ["--accelerator", "cpu", "--precision", "32-true"]


def options(name, folder, *more, config=None):
    config = config or CONFIGS / FILES[name]
    return ["--model", name, "--config", str(config), "--output_dir", str(folder), *CPU, *more]


def mask(name, path):
    """Half of the weights of the pretrained model."""
    module = models.find(name)
    view = module.prunable_view(module.build(load_config(CONFIGS / SIZES[name], module.Config)))
    generator = torch.Generator().manual_seed(0)
    masks = {key: torch.rand(w.parameter.shape, generator=generator) < 0.5 for key, w in view.weights.items()}
    aliases = {key: weight.aliases for key, weight in view.weights.items()}
    Masks(masks, {"pruner": "rand", "sparsity": "0.5"}, aliases).save(path)
    return path


def changed(path, source, **values):
    """A configuration with other values."""
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(source).read_text()) | values))
    return path


@pytest.mark.parametrize("name", FILES)
def test_dense(tmp_path, name, capsys):
    vqa.main(options(name, tmp_path / "out", "--dense"))
    result = tmp_path / "out" / "result"
    metrics = json.loads((result / "metrics.json").read_text())
    assert list(metrics) == ["scenes", "unseen_scenes"] and "accuracy" in metrics["scenes"]
    for split in metrics:
        given = json.loads((result / f"answers_{split}.json").read_text())
        assert len({one["question_id"] for one in given}) == len(given) > 9
        assert all(set(one) == {"question_id", "answer"} and one["answer"] for one in given)
    assert not (result / "mask.safetensors").exists()
    assert f"# {name}_vqa" in (result / "README.md").read_text()
    assert "scenes: accuracy" in capsys.readouterr().out
    log = (tmp_path / "out" / "log.csv").read_text()
    assert log.count("validation/accuracy,") == 2  # after each epoch


@pytest.mark.parametrize(("name", "inherit"), [("xvlm", False), ("xvlm", True), ("blip", False)])
def test_with_a_mask(tmp_path, name, inherit):
    path = mask(name, tmp_path / "m.safetensors")
    flags = ["--inherit_mask"] if inherit else []
    vqa.main(options(name, tmp_path / "out", "--mask", str(path), *flags))
    result = tmp_path / "out" / "result"
    weights, held = load_file(result / "model.safetensors"), Masks.load(result / "mask.safetensors")
    for key, kept in held.items():
        assert (weights[key][~kept] == 0).all() and (weights[key][kept] != 0).all()
    decoder = "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"
    assert (decoder in held) == (inherit or name == "blip")
    assert ((weights[decoder] == 0).float().mean() > 0.4) == (decoder in held)
    assert "pruner: rand" in (result / "README.md").read_text()


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path):
    for folder, flags in (("whole", []), ("parts", ["--incremental"]), ("parts", ["--incremental"])):
        vqa.main(options("xvlm", tmp_path / folder, "--dense", *flags))
    whole, parts = (load_file(tmp_path / folder / "result" / "model.safetensors") for folder in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["xvlm", pytest.param("blip", marks=pytest.mark.slow)])
def test_evaluation_alone(tmp_path, name):
    config = changed(tmp_path / "c.yaml", CONFIGS / FILES[name], scheduler={"epochs": 1})
    check_evaluation(vqa.main, ["--model", name, "--config", str(config), "--dense", *CPU], tmp_path)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["xvlm", pytest.param("blip", marks=pytest.mark.slow)])
def test_two_processes_evaluate_as_one(tmp_path, name):
    """With a rate of 0 the weights are the same, whoever reads what."""
    config = changed(tmp_path / "c.yaml", CONFIGS / FILES[name], optimizer={"lr": 0.0}, scheduler={"epochs": 1})
    vqa.main(options(name, tmp_path / "1", "--dense", config=config))
    script("vqa.py", *options(name, tmp_path / "2", "--dense", "--devices", "2", config=config))
    one, two = (tmp_path / devices / "result" for devices in ("1", "2"))
    for file in ("metrics.json", "answers_scenes.json", "answers_unseen_scenes.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    torch.testing.assert_close(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))


# Files in the public formats


@pytest.fixture
def public(tmp_path):
    """VQA2, Visual Genome and a list of answers, with a few images; the settings that name them."""
    rng = np.random.default_rng(0)
    for path in (*(f"coco/{s}2014/{i}.jpg" for s in ("train", "val") for i in range(4)), "vg/5.jpg", "coco/test/6.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / path)

    def asked(split, image, number, **more):
        question = {"question": f"What is number {number}?", "question_id": number, "dataset": "vqa"}
        return {"image": f"{split}/{image}.jpg", **question, **more}

    answers = ["yes"] * 6 + ["a cat"] * 3 + ["2"]
    content = {
        "vqa_train": [asked("train2014", i % 4, i, answer=answers) for i in range(10)],
        "vqa_val": [asked("val2014", i % 4, 100 + i, answer=answers) for i in range(7)],
        "vg_qa": [{"image": "image/5.jpg", "question": "Left?", "answer": "a bed", "dataset": "vg"}] * 3,
        "vqa_test": [asked("test", 6, 200 + i) for i in range(5)],
        "answer_list": ["yes", "no", "a cat", "2", "a bed"],
    }
    for name, records in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return {"vqa_root": str(tmp_path / "coco"), "vg_root": str(tmp_path / "vg")}


def reduced(tmp_path, name, public, **more):
    """The configuration of the full size: only sizes, and where things are, are others."""
    full = yaml.safe_load(Path(f"configs/{name}/vqa.yaml").read_text())
    files = {key: [str(tmp_path / Path(file).name) for file in full[key]] for key in ("train_file", "test_file")}
    small = {"model_config": str(CONFIGS / SIZES[name]), "weights": "random", "image_res": 48, "max_tokens": 24}
    batches = {"batch_size_train": 2, "batch_size_target": 4, "workers": 1}
    answers = {"answer_list": str(tmp_path / Path(full["answer_list"]).name)}
    return changed(
        tmp_path / "full.yaml", f"configs/{name}/vqa.yaml", **public, **files, **small, **batches, **answers, **more
    )


@pytest.mark.parametrize("name", FILES)
def test_the_configuration_of_the_full_size(tmp_path, name, public):
    epochs = {"scheduler": yaml.safe_load(Path(f"configs/{name}/vqa.yaml").read_text())["scheduler"] | {"epochs": 2}}
    vqa.main(options(name, tmp_path / "out", "--dense", "--debug", config=reduced(tmp_path, name, public, **epochs)))
    result = tmp_path / "out" / "result"
    given = json.loads((result / "answers_test.json").read_text())
    assert [one["question_id"] for one in given] == [200, 201, 202, 203, 204]
    assert {one["answer"] for one in given} <= {"yes", "no", "a cat", "2", "a bed"}
    assert json.loads((result / "metrics.json").read_text()) == {"test": {"questions": 5.0}}
    assert "weights of epoch" not in (result / "README.md").read_text()  # without val_file none are chosen


def test_validation_by_ten_annotators(tmp_path, public):
    config = reduced(tmp_path, "xvlm", public, val_file=[str(tmp_path / "vqa_val.json")])
    vqa.main(options("xvlm", tmp_path / "out", "--dense", "--debug", config=config))
    log = (tmp_path / "out" / "log.csv").read_text().splitlines()
    found = {float(line.split(",")[3]) for line in log if ",validation/accuracy," in line}
    assert found <= {0.0, 30.0, 90.0, 100.0} and found  # no one's, "2", "a cat", "yes"


def test_an_image_that_cannot_be_read_leaves_its_questions_unanswered(tmp_path, public):
    (tmp_path / "coco/test/6.jpg").write_bytes(b"no image")
    arguments = options("xvlm", tmp_path / "out", "--dense", "--debug", config=reduced(tmp_path, "xvlm", public))
    with pytest.raises(ValueError, match=r"skipped.txt: 1 of 1 samples were skipped"):
        vqa.main(arguments)
    vqa.main([*arguments, "--max_skipped", "1"])  # goes on from the snapshot
    given = json.loads((tmp_path / "out/result/answers_test.json").read_text())
    assert {one["answer"] for one in given} == {""} and len(given) == 5
    assert "6.jpg" in (tmp_path / "out/skipped.txt").read_text()


# Misuse


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --mask FILE to train a pruned model, or --dense"),
        (["--mask", "nowhere.safetensors"], "--mask nowhere.safetensors: mask file not found"),
        (["--dense", "--devices", "3"], "batch_size_target 8 is no multiple of batch_size_train 4 x 3 devices = 12"),
        (["--dense", "-pre", "nowhere.pth"], "nowhere.pth: weights file not found"),
    ],
)
def test_options_that_cannot_be(tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        vqa.main(options("xvlm", tmp_path, *flags))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k_test": 0}, "k_test must be at least 1"),
        ({"answer_list": "a.json"}, "set bundled, or train_file, val_file, test_file and answer_list, not both"),
        ({"bundled": {"train_questions": 4, "val_scenes": 2, "test_scenes": 2, "test": ["seen"]}}, "got 'seen'"),
        ({"bundled": None}, "no data: set train_file, or bundled"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, values, message):
    config = changed(tmp_path / "c.yaml", CONFIGS / "vqa.yaml", **values)
    with pytest.raises(ValueError, match=rf"c.yaml: .*{message}"):
        vqa.main(options("xvlm", tmp_path / "out", "--dense", config=config))


def test_a_mask_of_another_model(tmp_path):
    path = mask("blip", tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"--mask .*m.safetensors: the masks do not fit this model: \d+ missing: vision"
    ):
        vqa.main(options("xvlm", tmp_path / "out", "--mask", str(path)))


def test_a_model_without_the_task(tmp_path):
    with pytest.raises(ValueError, match="there is no vqa with the model 'dino'; there is with: xvlm, blip"):
        vqa.main(["--model", "dino", "--dense"])
