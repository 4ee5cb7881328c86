"""Records of a user's own file, one by one: each is either understood or a fault that says where it stands.

The same stream is read by a run, which stops at the first fault, and by `--check_data`, which lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets.annotations import parse_json, read_json, shown
from sparsity.errors import MissingFileError, UserError
from sparsity.files import reading

T = TypeVar("T")

LINES = (".jsonl", ".ndjson")  # files with a record in each line
HOW = "docs/data.md shows what such files hold"


class Fault(NamedTuple):
    """A fault of a record. where: its file and number."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Rows = Iterator[tuple[str, Any]]  # where a record stands, and what stands there, or a UserError


def rows(path: Path, expected: str) -> Rows:
    """Yield where each record of a .json or .jsonl file stands, and the record.

    A mapping of a .json file, {image: captions}, is read as records with the keys "image" and "caption". Raises
    FileNotFoundError, or UserError where the file as a whole is not as expected.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such file; expected {expected}; {HOW}")
    if path.suffix in LINES:
        yield from _lines(path)
        return
    if path.suffix != ".json":
        raise UserError(f"{path}: expected a .json or .jsonl file, a folder or shards (.tar); {HOW}")
    content = read_json(path, f"a JSON list of {expected}")
    if isinstance(content, dict):
        content = [{"image": image, "caption": captions} for image, captions in content.items()]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: expected a JSON list of {expected}, got {shown(content)}; {HOW}")
    for number, record in enumerate(content):
        yield f"{path}: record {number}", record


def _lines(path: Path) -> Rows:
    with reading(path):
        content = path.read_bytes()
    found = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: no record in this file; {HOW}")
    for number, line in found:
        try:
            yield f"{path}: line {number}", parse_json(line)
        except UserError as error:
            yield f"{path}: line {number}", UserError(f"not JSON ({error})")


def parsed(found: Rows, parse: Callable[[dict, str], T], expected: str) -> Iterator[T | Fault]:
    """Yield what `parse` makes of each record and its place, or the fault that it, a UserError, says."""
    for where, record in found:
        try:
            if isinstance(record, UserError):
                raise record
            if not isinstance(record, dict):
                raise UserError(f"it is {shown(record)}")
            yield parse(record, where)
        except UserError as error:
            yield Fault(where, f"{error}; expected {expected}")


def whole(found: Iterable[T | Fault]) -> list[T]:
    """Return the records; raises UserError with the first fault."""
    records = []
    for each in found:
        if isinstance(each, Fault):
            raise UserError(f"{each}; --check_data lists all faults")
        records.append(each)
    return records
