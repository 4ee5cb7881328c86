import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from models.parts.tokenizer import SPECIAL_TOKENS, WordPiece, read_vocab, slice_vocab

BERT, MINI = "data/vocab/bert_vocab.txt", "data/vocab/mini_vocab.txt"


@pytest.fixture(scope="module")
def bert():
    return WordPiece(BERT)


def test_bert_vocabulary(bert):
    assert bert.vocab_size == 30522
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 100, 101, 102, 103)


@pytest.mark.parametrize(
    ("text", "ids"),  # ids of bert-base-uncased
    [
        ("Hello, world!", [7592, 1010, 2088, 999]),
        ("a picture of a dog", [1037, 3861, 1997, 1037, 3899]),
        ("unaffable", [14477, 20961, 3468]),
        ("Café", [7668]),
        ("", []),
    ],
)
def test_known_ids(bert, text, ids):
    assert bert.encode(text) == ids


def test_equals_the_tokenizer_of_transformers(bert):
    tokenization_bert = pytest.importorskip("transformers.models.bert.tokenization_bert")
    theirs = tokenization_bert.BertTokenizer(BERT)
    for text in ("Don't stop: a naïve façade, 3.14 kg", "tyrannosaurus-rex", "日本 emoji 😀"):
        assert bert.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_ids_and_tokens_are_inverse(bert):
    tokens = read_vocab(BERT)
    assert [bert.id_to_token(i) for i in range(bert.vocab_size)] == tokens
    assert [bert.token_to_id(token) for token in tokens[::1000]] == list(range(0, 30522, 1000))
    assert bert.decode([bert.cls_id, *bert.encode("unaffable dogs"), bert.sep_id]) == "unaffable dogs"


def test_unknown_ids_and_tokens_are_errors(bert):
    with pytest.raises(ValueError, match="30521, got 30522"):
        bert.id_to_token(30522)
    with pytest.raises(ValueError, match="no token 'tyrannosaurus'"):
        bert.token_to_id("tyrannosaurus")


def test_pickles(bert):
    assert pickle.loads(pickle.dumps(bert)).encode("unaffable") == bert.encode("unaffable")


def test_bad_vocabulary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt: vocabulary file not found"):
        WordPiece(tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\ndog\n")
    with pytest.raises(ValueError, match=r"vocab.txt: no \[SEP\], \[MASK\]"):
        WordPiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("dog\ndog\n")
    with pytest.raises(ValueError, match="stands there twice"):
        WordPiece(tmp_path / "vocab.txt")


def test_a_slice_writes_its_texts_as_the_full_vocabulary_does(bert, tmp_path):
    texts = ["grinning unaffable mangoes", "a tyrannosaurus"]
    tokens = slice_vocab(bert, texts, size=200)
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    small = WordPiece(tmp_path / "vocab.txt")
    assert small.vocab_size == len(set(tokens)) == 200 and tuple(tokens[:5]) == SPECIAL_TOKENS and small.pad_id == 0
    for text in texts:
        assert [small.id_to_token(i) for i in small.encode(text)] == [bert.id_to_token(i) for i in bert.encode(text)]
    assert small.unk_id not in small.encode("zyxw 907 other words of ascii letters")
    assert slice_vocab(bert, reversed(texts), size=200) == tokens
    with pytest.raises(ValueError, match="size must be at least"):
        slice_vocab(bert, texts, size=80)


def test_mini_vocabulary_writes_every_concept(bert):
    mini = WordPiece(MINI)
    assert mini.vocab_size == 2048 and set(read_vocab(MINI)) <= set(read_vocab(BERT))
    for concept in json.loads(Path("data/bundled/concepts.json").read_text())["concepts"]:
        name = concept["name"]
        assert [mini.id_to_token(i) for i in mini.encode(name)] == [bert.id_to_token(i) for i in bert.encode(name)]


@pytest.mark.script
def test_mini_vocabulary_is_what_the_script_builds(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("configs", "datasets", "models", "scripts", "sparsity"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    (tmp_path / "data" / "bundled").symlink_to(Path("data/bundled").resolve())
    (tmp_path / "data" / "vocab").mkdir()
    for name in ("bert_vocab.txt", "mini_words.txt"):
        (tmp_path / "data" / "vocab" / name).symlink_to(Path("data/vocab", name).resolve())
    command = [tmp_path / "scripts" / "build_vocab.sh"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable})
    assert read_vocab(tmp_path / MINI) == read_vocab(MINI)
