"""Texts of a file, tokenised and packed into rows by the model's own tokenizer, for models that read text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from configs.pruning import ExternalPruneConfig
from configs.sources import TEXT_FILES
from datasets.annotations import get_text, parse_json
from datasets.calibration.own_data import OwnData
from datasets.place import ALONE, Place
from sparsity.errors import MissingFileError, UserError, listed
from sparsity.files import reading

KEYS = ("text", "caption")  # of an object in a line of .jsonl, the first that is there


class Packing(Protocol):
    """Turn texts into batches. rows: texts -> token ids of each row; then rows -> batch."""

    def rows(self, texts: Sequence[str]) -> list[list[int]]: ...

    def __call__(self, rows: Sequence[Sequence[int]]) -> Any: ...


def read_texts(path: str | Path) -> list[str]:
    """Return the texts of a file: of .txt each line, of .jsonl in each line a text or an object with one under a key of
    `KEYS`; empty lines are passed over.

    Raises MissingFileError, or UserError that names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file of texts")
    try:
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from None
    parse = _parsed if path.suffix == ".jsonl" else str.strip
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [parse(line)] if line.strip() else []
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}") from None
    if not found:
        raise UserError(f"{path}: no text in this file; expected {' or '.join(TEXT_FILES)} with a text in each line")
    return found


def _parsed(line: str) -> str:
    content = parse_json(line)
    if isinstance(content, str):
        return get_text({"text": content}, "text")
    if not isinstance(content, dict):
        raise UserError(f"expected a text or an object with the key {' or '.join(KEYS)}, got {content!r:.40}")
    return get_text(content, next((key for key in KEYS if key in content), KEYS[0]))


class TextRows:
    """Rows of token ids; the same in each pass."""

    def __init__(self, path: str | Path, packing: Packing):
        texts = read_texts(path)
        self.rows = packing.rows(texts)
        longest = max(map(len, self.rows))
        first = listed([f"{text[:40]!r}" for text in texts], 2)
        self.told = f"{path}: {len(texts)} texts ({first}), packed into {len(self.rows)} rows of {longest} tokens"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> list[int]:
        return self.rows[n % len(self.rows)]


class TextBatches(OwnData):
    """Batches of the texts of a file as a model takes them; see `OwnData`."""

    def __init__(
        self,
        config: ExternalPruneConfig,
        packing: Packing,
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
        *,
        path: str = "",
        choose: Callable[[int], Sequence[int]] | None = None,
    ):
        data = TextRows(path or config.calibration, packing)
        chosen = choose(len(data)) if choose else None
        super().__init__(data, _Gather(packing), config, folder, num_batches, seed, place, chosen)


class _Gather:
    """Rows to {"batch": batch}."""

    def __init__(self, packing: Packing):
        self.packing = packing

    def __call__(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        return {"batch": self.packing(rows)}
