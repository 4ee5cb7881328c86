"""retrieval.py, captioning.py and vqa.py on a user's own data: tiny models of transformers and the project's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import captioning
import retrieval
import vqa
from models.external import model as external
from sparsity.errors import UserError
from sparsity.masks import Masks
from tests import tiny_models
from tests.models.external.test_preprocessing import processor_of
from tests.models.foreign.test_writing import blip_for_questions
from tests.own_data import captioned, questioned
from tests.processes import PATIENCE, PLAIN, ROOT
from tests.test_finetuning import log_rows
from tests.tiny_models import image_processor, tokenizer

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]
CPU = ["--accelerator", "cpu", "--precision", "32-true"]


def folder_of(kind, folder):
    """A model of transformers with random weights, as it would come from the hub."""
    torch.manual_seed(0)
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    return tiny_models.save(tiny_models.TRANSFORMERS[kind](), folder / kind, processor)


def mask_of(model, path):
    """Half of the weights of a model, by chance; returns the path of their masks."""
    view, generator = external.prunable_view(external.build(model)), torch.Generator().manual_seed(1)
    masks = {name: torch.rand(w.parameter.shape, generator=generator) > 0.5 for name, w in view.weights.items()}
    Masks(masks, {"pruner": "toss", "sparsity": "0.5", "seed": 1}).save(path)
    return path


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_towers_train_under_a_mask(tmp_path, kind):
    model = f"hf:{folder_of(kind, tmp_path)}"
    mask = mask_of(model, tmp_path / "mask.safetensors")
    data = captioned(tmp_path / "own", 12)
    options = ["--data", str(data), "--val_fraction", "0.25", "--batch_size", "6", "--epochs", "2", "--lr", "1e-3"]
    options += ["--model", model, "--mask", str(mask), "--output_dir", str(tmp_path / "out"), *CPU]
    retrieval.main(options)
    result = tmp_path / "out/result"
    metrics = json.loads((result / "metrics.json").read_text())["val"]
    assert 0 < metrics["r_mean"] <= 100
    own, before = load_file(result / "model.safetensors"), load_file(tmp_path / kind / "model.safetensors")
    for name, kept in Masks.load(mask).items():
        assert not own[name][~kept].any()
    assert own.keys() == before.keys()
    assert not torch.equal(own["logit_scale"], before["logit_scale"])
    again = external.build(f"hf:{result}")
    Masks.load(result / "mask.safetensors").resolve(external.prunable_view(again))  # as prune.py reads both
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in own.items())
    transformers.AutoProcessor.from_pretrained(result)


@pytest.mark.parametrize("name", ["xvlm", "blip"])
def test_our_own_models_take_captions_without_a_configuration_of_theirs(tmp_path, name):
    data = captioned(tmp_path / "own", 12)
    options = ["--data", str(data), "--val_fraction", "0.25", "--batch_size", "6", "--epochs", "1"]
    retrieval.main(["--model", name, "--dense", "--output_dir", str(tmp_path / "out"), *options, *CPU])
    assert json.loads((tmp_path / "out/result/metrics.json").read_text()).keys() == {"val"}
    assert "validation/r_mean" in (tmp_path / "out/log.csv").read_text()


@pytest.mark.parametrize("name", ["xvlm", "hf"])
def test_a_bad_record_is_one_line(tmp_path, name, caplog):
    data = captioned(tmp_path / "own", 3)
    data.write_text(json.dumps([{"image": "0.png", "caption": "x"}, {"image": "1.png"}]))
    model = "xvlm" if name == "xvlm" else f"hf:{folder_of('clip', tmp_path)}"
    options = ["--model", model, "--dense", "--data", str(data), "--output_dir", str(tmp_path / "out"), *CPU]
    with pytest.raises(UserError, match="record 1: no key 'caption'"):
        retrieval.main(options)
    caplog.set_level("INFO")
    with pytest.raises(UserError, match="1 faults, listed above"):
        retrieval.main([*options, "--check_data"])
    assert f"{data}: record 1: no key 'caption'" in caplog.text


def writer(kind, folder):
    """A model that writes, of this kind, with its processor."""
    torch.manual_seed(0)
    return tiny_models.save(tiny_models.TRANSFORMERS[kind](), folder / kind, processor_of(kind, chat=kind == "llava"))


@pytest.mark.parametrize("kind", ["blip2", "llava"])
def test_captioners_train_under_a_mask(tmp_path, kind):
    model = f"hf:{writer(kind, tmp_path)}"
    mask = mask_of(model, tmp_path / "mask.safetensors")
    options = ["--data", str(captioned(tmp_path / "own", 8)), "--val_fraction", "0.25", "--batch_size", "6"]
    options += ["--model", model, "--mask", str(mask), "--output_dir", str(tmp_path / "out"), *CPU]
    captioning.main([*options, "--epochs", "2", "--lr", "1e-3", "--workers", "0"])
    result = tmp_path / "out/result"
    metrics = json.loads((result / "metrics.json").read_text())["val"]
    assert any(name.startswith("cider") for name in metrics)
    captions = json.loads((result / "captions_val.json").read_text())
    assert len(captions) == 2 and all(isinstance(found["caption"], str) for found in captions)
    again = external.build(f"hf:{result}").state_dict()
    for name, kept in Masks.load(mask).items():
        assert not again[name][~kept].any()


@pytest.mark.parametrize("name", ["xvlm", "blip"])
def test_our_own_captioners_take_captions(tmp_path, name):
    options = ["--data", str(captioned(tmp_path / "own", 8)), "--val_fraction", "0.25", "--batch_size", "6"]
    options += ["--model", name, "--dense", "--output_dir", str(tmp_path / "out"), "--epochs", "1", *CPU]
    captioning.main(options)
    captions = json.loads((tmp_path / "out/result/captions_val.json").read_text())
    assert [found["image_id"] for found in captions] == sorted(found["image_id"] for found in captions)
    assert len(captions) == 2


@pytest.mark.parametrize("kind", ["blip", "blip2", "llava"])
def test_models_that_write_answer_questions(tmp_path, kind):
    torch.manual_seed(0)
    model = f"hf:{blip_for_questions(tmp_path / 'blip') if kind == 'blip' else writer(kind, tmp_path)}"
    mask = mask_of(model, tmp_path / "mask.safetensors")
    options = ["--data", str(questioned(tmp_path / "own", 8)), "--val_fraction", "0.25", "--batch_size", "6"]
    options += ["--model", model, "--mask", str(mask), "--output_dir", str(tmp_path / "out"), *CPU]
    vqa.main([*options, "--epochs", "2", "--lr", "1e-3", "--workers", "0"])
    result = tmp_path / "out/result"
    metrics = json.loads((result / "metrics.json").read_text())["val"]
    assert metrics.keys() == {"accuracy", "exact_match"} and all(0 <= value <= 100 for value in metrics.values())
    assert len(json.loads((result / "answers_val.json").read_text())) == 4
    again = external.build(f"hf:{result}").state_dict()
    for name, kept in Masks.load(mask).items():
        assert not again[name][~kept].any()


@pytest.mark.parametrize("name", ["xvlm", "blip"])
def test_our_own_models_answer_own_questions(tmp_path, name):
    options = ["--data", str(questioned(tmp_path / "own", 8)), "--val_fraction", "0.25", "--batch_size", "6"]
    options += ["--model", name, "--dense", "--output_dir", str(tmp_path / "out"), "--epochs", "1", *CPU]
    vqa.main(options)
    answers = json.loads((tmp_path / "out/result/answers_val.json").read_text())
    known = {text for record in json.loads((tmp_path / "own/questions.json").read_text()) for text in record["answers"]}
    assert len(answers) == 4 and all(found["answer"] in known | {"w"} or found["answer"] for found in answers)


STEPS = ["--batch_size", "4", "--epochs", "2", "--lr", "1e-2", "--workers", "0", "--val_fraction", "0.2"]


def trained(folder, name="model.safetensors"):
    return load_file(folder / "result" / name)


@pytest.mark.parametrize("kind", ["clip"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, kind):
    model, data = f"hf:{folder_of(kind, tmp_path)}", captioned(tmp_path / "own", 10)
    options = ["--model", model, "--mask", str(mask_of(model, tmp_path / "mask.safetensors")), "--data", str(data)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    retrieval.main([*options, *STEPS, *CPU, "--output_dir", str(whole)])
    for _ in range(2):  # an epoch each
        retrieval.main([*options, *STEPS, *CPU, "--output_dir", str(parts), "--incremental"])
    assert trained(whole).keys() == trained(parts).keys()
    assert all(torch.equal(tensor, trained(parts)[name]) for name, tensor in trained(whole).items())
    assert (whole / "result/metrics.json").read_bytes() == (parts / "result/metrics.json").read_bytes()
    data.write_text(data.read_text().replace("photo", "dog"))
    with pytest.raises(UserError, match="another"):  # other captions under the same name are another run
        retrieval.main([*options, *STEPS, *CPU, "--output_dir", str(parts), "--evaluate"])


@pytest.mark.slow  # tests/test_sparse_product.py has all kinds of models on two processes
@pytest.mark.multiprocess
def test_two_processes_train_as_one(tmp_path):
    """The same batches, contrasted over both processes: the same weights within the order of additions."""
    model, data = f"hf:{folder_of('clip', tmp_path)}", captioned(tmp_path / "own", 10)
    options = ["--model", model, "--mask", str(mask_of(model, tmp_path / "mask.safetensors")), "--data", str(data)]
    options += [*STEPS, *CPU, "--optimizer", "sgd"]
    retrieval.main([*options, "--output_dir", str(tmp_path / "one")])
    command = [sys.executable, "retrieval.py", *options, "--devices", "2", "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=PLAIN, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    two, before = trained(tmp_path / "two"), load_file(Path(model.removeprefix("hf:")) / "model.safetensors")
    moved = 0.0
    for name, tensor in trained(tmp_path / "one").items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
        moved += float((tensor - before[name]).abs().max())
    assert moved > 1e-3
    metrics = [json.loads((tmp_path / folder / "result/metrics.json").read_text()) for folder in ("one", "two")]
    assert metrics[0] == metrics[1]


SPARSE = {"gradual": ["--gradual", "75", "--dense"], "distill": ["--distill", "0.5"], "lora": ["--lora", "4"]}


@pytest.mark.parametrize(("kind", "way"), [("clip", "distill"), ("llava", "lora"), ("blip2", "gradual")])
def test_ways_of_sparse_training(tmp_path, kind, way):
    """The result loads with transformers, and is zero wherever its mask is. All: tests/test_sparse_product.py."""
    two = kind in ("clip", "siglip")
    model, run = f"hf:{(folder_of if two else writer)(kind, tmp_path)}", retrieval if two else captioning
    mask = [] if way == "gradual" else ["--mask", str(mask_of(model, tmp_path / "mask.safetensors"))]
    options = ["--data", str(captioned(tmp_path / "own", 4)), "--val_fraction", "0", "--batch_size", "4", *mask]
    options += ["--model", model, "--output_dir", str(tmp_path / "out"), *CPU, *SPARSE[way], "--skip_eval"]
    run.main([*options, "--epochs", "2", "--lr", "1e-3", "--workers", "0"])
    result = tmp_path / "out/result"
    again = external.build(f"hf:{result}").state_dict()
    masks = Masks.load(result / "mask.safetensors")
    assert masks and all(not again[name][~kept].any() for name, kept in masks.items())


@pytest.mark.parametrize(("kind", "script"), [("clip", retrieval), ("paligemma", captioning)])
def test_the_result_of_a_run_teaches_the_next(tmp_path, kind, script):
    """Whatever names its files have, and where tied weights stand once: what a run starts from has nothing to teach."""
    model = f"hf:{(folder_of if script is retrieval else writer)(kind, tmp_path)}"
    options = ["--data", str(captioned(tmp_path / "own", 4)), "--val_fraction", "0", "--batch_size", "4", "--dense"]
    options += ["--model", model, "--workers", "0", "--skip_eval", "--optimizer", "sgd", "--weight_decay", "0", *CPU]
    script.main([*options, "--epochs", "0", "--output_dir", str(tmp_path / "first")])
    teacher = ["--distill", "1", "--teacher", str(tmp_path / "first/result/model.safetensors")]
    script.main([*options, *teacher, "--epochs", "1", "--output_dir", str(tmp_path / "out")])
    losses = [float(value) for _, name, value in log_rows(tmp_path / "out")[1:] if name == "distill"]
    assert losses == pytest.approx([0.0], abs=1e-6)
