"""Everything of a user's own data, read once: what there is, and every fault by file and record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from configs.decoding import Decoding
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.own.captions import captioned_rows
from datasets.own.images import Source
from datasets.own.questions import question_rows
from datasets.own.records import Fault
from sparsity.errors import UserError

READERS = {"captions": captioned_rows, "questions": question_rows}  # kind of data -> what reads it


@dataclass
class Checked:
    """Counts of what was read from `path`. texts: captions or questions. faults: of records and images, each once."""

    path: str
    kind: str
    records: int = 0
    images: int = 0
    texts: int = 0
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        found = f"{self.path}: {self.records:,} records, {self.images:,} images, {self.texts:,} {self.kind}"
        return f"{found}; {len(self.faults):,} faults" if self.faults else f"{found}; all can be read"


def check_own(path: str, kind: str, decoding: Decoding = DEFAULT) -> Checked:
    """Read all records and images of a file, a folder or shards. kind: one of READERS.

    What keeps it from being read at all is a fault, too.
    """
    checked, seen = Checked(path, kind), set()
    try:
        found, source = READERS[kind](path, decoding)
        for record in tqdm(_numbered(found, checked), desc=path, delay=2, leave=False):
            checked.texts += len(record.captions) if kind == "captions" else 1
            if record.image not in seen:
                seen.add(record.image)
                checked.faults += _unreadable(source, record)
    except (UserError, OSError) as error:
        checked.faults.append(Fault(path, str(error).removeprefix(f"{path}: ")))
    checked.images = len(seen)
    return checked


def _numbered(found: Iterator[Any], checked: Checked) -> Iterator[Any]:
    """Yield the records that are understood, and count all."""
    for each in found:
        checked.records += 1
        if isinstance(each, Fault):
            checked.faults.append(each)
        else:
            yield each


def _unreadable(source: Source, record: Any) -> Sequence[Fault]:
    read = source.load(record.image)
    return [Fault(record.where, f"'image' {read.path}: {read.reason}")] if isinstance(read, Skipped) else []
