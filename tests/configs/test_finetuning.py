"""Configurations of the fine-tuning scripts: what they compute, and that every file in configs/ is one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from configs.finetuning import CaptioningPretrainConfig, RetrievalConfig
from configs.foreign import (
    ForeignCaptioningConfig,
    ForeignClassificationConfig,
    ForeignRetrievalConfig,
    ForeignVQAConfig,
)
from configs.loading import build, load_config, read_yaml
from configs.task import DEBUG_IMAGES, DEBUG_STEPS
from engine.options.finetuning import refuse_nlvr2
from sparsity.errors import UserError

PLAIN = {
    "model_config": "m.yaml",
    "weights": "random",
    "optimizer": {"lr": 1e-3},
    "scheduler": {"epochs": 2},
    "batch_size_train": 4,
    "batch_size_target": 24,
}
BUNDLED = {"bundled": {"train_scenes": 10, "val_scenes": 5, "test_scenes": 6}}
FILES = {"train_file": ["a.json"], "val_file": "v.json", "test_file": "t.json", "image_root": "images"}


def config(**change):
    return build(RetrievalConfig, PLAIN | change, "c.yaml")


@pytest.mark.parametrize(("devices", "parts"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_a_step_has_the_same_samples_on_any_number_of_devices(devices, parts):
    assert config().accumulation(devices) == parts


@pytest.mark.parametrize("devices", [4, 5, 7, 12])
def test_batches_that_do_not_make_up_a_step_are_refused(devices):
    with pytest.raises(
        ValueError, match=f"24 is no multiple of batch_size_train 4 x {devices} devices = {4 * devices}:"
    ):
        config().accumulation(devices)


def test_steps_of_an_epoch():
    assert [config().steps_per_epoch(n) for n in (1, 24, 25, 240)] == [1, 1, 2, 10]
    assert config().steps_per_epoch(240, debug=True) == DEBUG_STEPS and config().steps_per_epoch(3, debug=True) == 1


def test_what_decides_the_result():
    same = config(workers=5, max_skipped=0.5, save_every=3, log_every=2, wandb_data={"name": "x"})
    assert same.identity() == config().identity()
    for change in ({"clip_norm": 1.0}, {"optimizer": {"lr": 2e-3}}, {"k_test": 3}, {"batch_size_target": 48}):
        assert config(**change).identity() != config().identity()


def test_evaluation_on_scenes_and_on_files():
    scenes = config(**BUNDLED).evaluations()
    assert list(scenes) == ["val", "scenes", "unseen_scenes"]
    assert scenes["val"].bundled_seed != scenes["scenes"].bundled_seed, "no image of the test chooses the weights"
    files = config(**FILES).evaluations(debug=True)
    assert {name: found.files.annotations for name, found in files.items()} == {"val": "v.json", "test": "t.json"}
    assert all(found.limit == DEBUG_IMAGES and found.k_test == 256 for found in files.values())


RETRIEVAL = [path for path in sorted(Path("configs").glob("*/retrieval*.yaml")) if path.parent.name != "external"]
FOREIGN = {"retrieval": ForeignRetrievalConfig, "captioning": ForeignCaptioningConfig, "vqa": ForeignVQAConfig}


@pytest.mark.parametrize("task", FOREIGN)
def test_models_of_other_libraries_need_data_of_the_users(tmp_path, task):
    found = load_config(f"configs/external/{task}.yaml", FOREIGN[task])
    assert found.accumulation(1) >= 1
    with pytest.raises(UserError, match="give --data "):
        found.check_data("here")
    with pytest.raises(FileNotFoundError, match="--data gone.json: there is no such file"):
        replace(found, data="gone.json").check_data("here")


def test_data_of_the_users_takes_the_place_of_the_configurations():
    options = {"devices": 1, "num_nodes": 1}
    for other in (BUNDLED, FILES):
        own = config(**other, data="captions.json").overridden(options)
        assert own == config(data="captions.json") and own.evaluations().keys() == {"val"}
    assert config(data="captions.json", val_fraction=0).evaluations() == {}
    with pytest.raises(UserError, match="val_data is for data of one's own"):
        config(val_data="captions.json")


@pytest.mark.parametrize("path", RETRIEVAL, ids=str)
def test_the_configurations_of_the_repository(path):
    found = load_config(path, RetrievalConfig)
    assert re.match(rf"# python retrieval.py --model {path.parent.name} ", path.read_text())
    read_yaml(found.model_config)
    assert found.accumulation(1) >= found.accumulation(2) >= 1
    assert found.evaluations()["val"]


def test_the_published_recipe_of_xvlm():
    found = load_config("configs/xvlm/retrieval.yaml", RetrievalConfig)
    optimizer, scheduler = found.optimizer, found.scheduler
    assert (optimizer.opt, optimizer.lr, optimizer.weight_decay, optimizer.lr_mult) == ("adamW", 3e-5, 0.01, 1)
    assert optimizer.betas == (0.9, 0.98)
    assert (scheduler.sched, scheduler.epochs, scheduler.num_warmup_steps) == ("linear", 10, 0.1)
    assert (found.image_res, found.max_tokens, found.k_test) == (384, 40, 256)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*/captioning_pretrain*.yaml")), ids=str)
def test_captioning_pretraining_has_no_label_smoothing(path):
    assert load_config(path, CaptioningPretrainConfig).label_smoothing == 0.0


def test_options_take_the_place_of_a_recipe():
    """The same ones for every task; sizes of batches that are given apart stay apart."""
    options = {"devices": 2, "num_nodes": 1, "lr": 0.5, "epochs": 7, "batch_size": 32, "sched_type": "cosine"}
    options |= {"optimizer_name": "sgd", "weight_decay": 0.0, "image_size": 64, "warmup_frac": None}
    found = config().overridden(options)
    assert (found.batch_size_target, found.batch_size_train, found.image_res) == (32, 16, 64)
    assert (found.scheduler.epochs, found.scheduler.sched) == (7, "cosine")
    assert (found.optimizer.lr, found.optimizer.opt, found.optimizer.weight_decay) == (0.5, "sgd", 0.0)
    apart = config(batch_size_train=8).overridden(options | {"batch_size_train": 8})
    assert (apart.batch_size_target, apart.batch_size_train, apart.accumulation(2)) == (32, 8, 2)
    assert config().overridden({"devices": 1, "num_nodes": 1}) == config()
    with pytest.raises(ValueError, match="--batch_size 9 is no multiple of 2 devices"):
        config().overridden(options | {"batch_size": 9})


@pytest.mark.parametrize(("devices", "train", "parts"), [(1, 12, 2), (2, 12, 1), (4, 6, 1), (24, 1, 1)])
def test_a_recipe_for_one_device_does_for_several(devices, train, parts):
    """No device has more at a time than it is to, nor more than its share of a step."""
    options = {"devices": devices, "num_nodes": 1}
    found = config(batch_size_train=12).overridden(options)
    assert (found.batch_size_train, found.batch_size_target, found.accumulation(devices)) == (train, 24, parts)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_recipes_of_other_libraries_run_on_several_devices_as_they_are(devices):
    schemas = {"retrieval": ForeignRetrievalConfig, "captioning": ForeignCaptioningConfig, "vqa": ForeignVQAConfig}
    for task, schema in (schemas | {"image_classification": ForeignClassificationConfig}).items():
        recipe = load_config(Path("configs/external", f"{task}.yaml"), schema)
        recipe.overridden({"devices": devices, "num_nodes": 1}).accumulation(devices)


TASKS = ("retrieval", "captioning", "captioning_pretrain", "vqa", "image_classification")


def test_every_file_of_a_task_begins_with_its_command_and_says_what_to_expect():
    for script in TASKS:
        for path in sorted(Path("configs").glob(f"*/{script}*.yaml")):
            comment = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
            assert comment.startswith(f"# python {script}"), path
            assert "Time" in comment, path
            assert "CPU core" in comment or "Hardware" in comment, path
            assert re.search(r"Expect|number|result", comment) or path.stem == "retrieval_short", path


def test_nlvr2_is_refused_by_name():
    refuse_nlvr2("configs/xvlm/retrieval.yaml", "data/finetune/itr/coco_train.json")
    with pytest.raises(UserError, match="nlvr2_train.json: NLVR2, a sentence that is true or false of two images"):
        refuse_nlvr2("configs/xvlm/retrieval.yaml", "data/finetune/nlvr2_train.json")


def test_a_folder_of_the_users_is_the_file_that_lists_it(tmp_path):
    """Its content is compared when a run goes on."""
    options = {"devices": 1, "num_nodes": 1}
    assert config(data=str(tmp_path)).overridden(options).data == str(tmp_path)
    (tmp_path / "captions.json").touch()
    assert config(data=str(tmp_path)).overridden(options).data == str(tmp_path / "captions.json")
