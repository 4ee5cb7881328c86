"""Texts of files, in rows."""

import pytest

from configs.pruning import ExternalPruneConfig
from datasets.calibration.texts import TextBatches, read_texts
from sparsity.errors import MissingFileError, UserError


class Letters:
    """Packs letters, three in a row."""

    def rows(self, texts):
        letters = [ord(letter) for text in texts for letter in text]
        return [letters[i : i + 3] for i in range(0, len(letters), 3)]

    def __call__(self, rows):
        return ["".join(map(chr, row)) for row in rows]


def test_a_text_in_each_line(tmp_path):
    (tmp_path / "a.txt").write_text(" one cat \n\n two dogs\n")
    (tmp_path / "a.jsonl").write_text('"one cat"\n{"text": "two dogs", "caption": "no"}\n\n{"caption": "three"}\n')
    assert read_texts(tmp_path / "a.txt") == ["one cat", "two dogs"]
    assert read_texts(tmp_path / "a.jsonl") == ["one cat", "two dogs", "three"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('"a"\n{"b": 1}', r"line 2: no key 'text' \(it has 'b'\)"),
        ("[1]", "line 1: expected a text or an object with the key text or caption"),
        ('"a"\n{', "line 2: "),
        ('{"text": " "}', "line 1: 'text' must not be empty"),
        ("", r"no text in this file; expected .txt or .jsonl"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, content, told):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=rf"a.jsonl: {told}"):
        read_texts(tmp_path / "a.jsonl")


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="a.txt: not a text file in UTF-8"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(MissingFileError, match="b.txt: there is no such file of texts"):
        read_texts(tmp_path / "b.txt")


def test_rows_are_read_once_in_a_pass_and_the_last_one_counts(tmp_path):
    (tmp_path / "a.txt").write_text("abcd\nefgh\n")
    config = ExternalPruneConfig(calibration=str(tmp_path / "a.txt"), batch_size=2)
    read = TextBatches(config, Letters(), tmp_path, 99, 0)
    assert sorted(sum(read, [])) == ["abc", "def", "gh"] and list(map(len, read)) == [2, 1]
    assert "a.txt: 2 texts ('abcd', 'efgh'), packed into 3 rows of 3 tokens; 2 batches" in read.told
    assert list(read) == list(TextBatches(config, Letters(), tmp_path, 99, 0)), "the same for the same seed"
    held = TextBatches(config, Letters(), tmp_path, 99, 0, choose=lambda count: [1])
    assert sum(held, []) == ["def"]
