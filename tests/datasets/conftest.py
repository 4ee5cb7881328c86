import pytest

from datasets.text import TextEncoder
from models.parts.tokenizer import WordPiece


@pytest.fixture(scope="session")
def tokenizer():
    return WordPiece("data/vocab/mini_vocab.txt")


@pytest.fixture(scope="session")
def text(tokenizer):
    return TextEncoder(tokenizer, max_tokens=12, max_masks=3)
