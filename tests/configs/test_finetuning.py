"""Configurations of the fine-tuning scripts: what they compute, and that every file in configs/ is one."""

import re
from pathlib import Path

import pytest

from configs.finetuning import CaptioningPretrainConfig, RetrievalConfig
from configs.loading import build, load_config, read_yaml
from configs.task import DEBUG_IMAGES, DEBUG_STEPS

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


RETRIEVAL = sorted(Path("configs").glob("*/retrieval*.yaml"))


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
