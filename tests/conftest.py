import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from datasets.text import TextEncoder
from engine.launch import PACKAGES
from models.blip import model as blip
from models.parts.bert import TextConfig
from models.parts.clip_vision import VisionConfig
from models.parts.tokenizer import WordPiece
from models.xvlm import model as xvlm

SMALL = Path("tests/data/xvlm_small")
SMALL_BLIP = Path("tests/data/blip_small")
CONFIG = xvlm.Config(
    vision=VisionConfig(image_size=48, patch_size=16, width=64, layers=2, heads=4, mlp_width=320, local_attn_depth=1),
    text=TextConfig(vocab_size=210, width=48, layers=8, fusion_layer=6, heads=4, mlp_width=96, max_positions=64),
    embed_dim=32,
)


BLIP_CONFIG = blip.Config(
    vision=blip.VisionConfig(image_size=48, patch_size=16, width=48, layers=2, heads=4),
    text=TextConfig(
        vocab_size=212,
        width=48,
        layers=3,
        fusion_layer=0,
        heads=4,
        mlp_width=96,
        max_positions=64,
        token_types=False,
    ),
    embed_dim=32,
    queue_size=32,
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """For `pytest -n ... --dist loadgroup`: tests that start processes never run beside each other, since these need
    the cores; else a file is on one worker, since its fixtures are for all its tests.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            together = "processes" if item.get_closest_marker("multiprocess") else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(together))


@pytest.fixture
def small_xvlm():
    """The model of the known answers, in evaluation mode."""
    return xvlm.build(CONFIG, SMALL / "state_dict.safetensors").eval()


@pytest.fixture
def small_blip():
    """The model of the known answers, in evaluation mode."""
    return blip.build(BLIP_CONFIG, SMALL_BLIP / "state_dict.safetensors").eval()


def read_batches(folder):
    """{"general": [batch, ...], "region": [batch, ...]} of known answers."""

    def split(tensors):
        names = {name.split(".", 1)[0] for name in tensors}
        return [{k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".", 1)[0] == i} for i in sorted(names)]

    return {kind: split(load_file(folder / f"{kind}_batches.safetensors")) for kind in ("general", "region")}


@pytest.fixture(scope="session")
def small_batches():
    return read_batches(SMALL)


@pytest.fixture(scope="session")
def blip_batches():
    return read_batches(SMALL_BLIP)


@pytest.fixture(scope="session")
def small_losses():
    return json.loads((SMALL / "losses.json").read_text())["losses"]


@pytest.fixture(autouse=True)
def log_levels():
    """A script sets what is heard of each package."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """For fixtures of every scope: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread_again(one_thread):
    """After a test that has set another number."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def no_network(monkeypatch):
    """As on a machine that reaches no hub."""
    for module in ("external.model", "hub"):
        monkeypatch.setattr(f"models.{module}.hub_answers", lambda: False)


@pytest.fixture
def write_image():
    """Writes an image of random pixels; returns the array."""

    def write(path, size=(40, 30), seed=0):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return pixels

    return write


@pytest.fixture
def write_json():
    def write(path, content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer():
    return WordPiece("data/vocab/mini_vocab.txt")


@pytest.fixture(scope="session")
def text(tokenizer):
    return TextEncoder(tokenizer, max_tokens=12, max_masks=3)
