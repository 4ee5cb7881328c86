import json

import numpy as np
import pytest
from PIL import Image

from datasets.text import TextEncoder
from models.parts.tokenizer import WordPiece


@pytest.fixture(scope="session")
def tokenizer():
    return WordPiece("data/vocab/mini_vocab.txt")


@pytest.fixture(scope="session")
def text(tokenizer):
    return TextEncoder(tokenizer, max_tokens=12, max_masks=3)


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
