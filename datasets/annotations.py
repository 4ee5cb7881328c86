"""Annotation files and image folders in the public layouts, checked when they are opened."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.collate import Skipped
from sparsity.errors import MissingFileError, UserError

HOW_TO_GET = "README.md says how to get the annotations and images"
_LARGEST = 1e9  # pixels that a number in a box may be
_PROBES = 64  # image paths that are looked up at start-up


class Records:
    """Read-only list of small objects in one buffer: DataLoader workers share it and would copy Python objects."""

    def __init__(self, records: Iterable[Any]):
        packed = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([len(p) for p in packed], dtype=np.int64)
        self._buffer = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"a record number must be between 0 and {len(self) - 1}, got {i!r}")
        start = self._ends[i - 1] if i else 0
        return pickle.loads(self._buffer[start : self._ends[i]])


def read_records(path: str | Path, parse: Callable[[dict], Any], expected: str) -> list[Any]:
    """Read a JSON list of objects.

    Args:
        path: the annotation file.
        parse: turns one object into what is kept of it; its UserErrors are reported with file and record number.
        expected: what a record looks like, for the error messages.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a JSON list of objects, it is empty, or a record lacks something.
    """
    records = read_json(Path(path), expected)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a JSON list of {expected}, got {type(records).__name__}; {HOW_TO_GET}")
    if not records:
        raise UserError(f"{path}: no record in this file; expected a JSON list of {expected}; {HOW_TO_GET}")
    for i, record in enumerate(tqdm(records, desc=Path(path).name, delay=2, leave=False)):
        records[i] = _parsed(path, i, record, parse, expected)  # in place: millions of records exist once
    return records


Folders = str | Path | Mapping[str, str]  # of images; by the "dataset" of a record, "" for any other


def read_by_folder(
    path: str | Path, folders: Folders, parse: Callable[[dict], Any], expected: str
) -> list[tuple[str | Path, list[Any]]]:
    """The records of an annotation file, see `read_records`, those with their images in one folder together."""
    if not isinstance(folders, Mapping):
        return [(folders, read_records(path, parse, expected))]
    found: dict[str, list[Any]] = {}
    for dataset, record in read_records(path, lambda record: (str(record.get("dataset")), parse(record)), expected):
        found.setdefault(folders.get(dataset, folders[""]), []).append(record)
    return list(found.items())


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds, which is to be a list of what is `expected`.

    Raises FileNotFoundError, or UserError where it is not JSON.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: annotation file not found; expected a JSON list of {expected}; {HOW_TO_GET}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also what is not UTF-8, and brackets in brackets in brackets
        raise UserError(f"{path}: not a JSON file ({error}); expected a list of {expected}; {HOW_TO_GET}") from None


def _parsed(path: str | Path, i: int, record: Any, parse: Callable[[dict], Any], expected: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{path}: record {i} is {record!r:.60}; expected {expected}")
    try:
        return parse(record)
    except ValueError as error:
        raise UserError(f"{path}: record {i}: {error}; expected {expected}") from None


def get_text(record: dict, key: str) -> str:
    """Text under a key; raises UserError where there is none."""
    if key not in record:
        raise UserError(f"no key {key!r} (it has {', '.join(map(repr, record))[:200] or 'none'})")
    if not isinstance(record[key], str):
        raise UserError(f"{key!r} must be a text, got {record[key]!r:.60}")
    return record[key]


def get_texts(record: dict, key: str) -> list[str]:
    """Texts under a key that holds one or a list of them, at least one; raises UserError otherwise."""
    value = record.get(key)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    if isinstance(value, list):
        raise UserError(f"{key!r} must be a text or a list of at least one text, got {value!r:.60}")
    return [get_text(record, key)]


def get_box(value: Any) -> tuple[float, float, float, float]:
    """The box [x, y, width, height] in pixels; raises UserError where it is none."""
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and abs(v) < _LARGEST for v in value)
    if not numbers or len(value) != 4:
        raise UserError(f"a box 'bb' must be [x, y, width, height] in pixels, got {value!r:.60}")
    return tuple(map(float, value))


class ImageRoot:
    """A folder of images, with paths of both public kinds: relative to the folder, or already starting with it.

    Raises FileNotFoundError where the folder is missing.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise MissingFileError(f"{root}: image folder not found; {HOW_TO_GET}")

    def find(self, path: str) -> Path:
        """Where an image lies; the path in this folder where it lies nowhere."""
        direct = os.path.join(self.root, path)
        if os.path.isfile(direct):  # what pathlib does in more than twice the time
            return Path(direct)
        parts, own = Path(path).parts, self.root.parts
        for shared in range(min(len(parts) - 1, len(own)), 0, -1):  # images/vg/1.jpg in .../images/vg
            inside = self.root.joinpath(*parts[shared:])
            if own[-shared:] == parts[:shared] and inside.is_file():
                return inside
        return Path(path if os.path.isfile(path) else direct)

    def check(self, annotation_file: str | Path, paths: list[str]) -> None:
        """Raise FileNotFoundError where none of the images of an annotation file (a few are looked up) is here."""
        probes = paths[:: max(1, len(paths) // _PROBES)]
        if not any(self.find(path).is_file() for path in probes):
            raise MissingFileError(
                f"{self.root}: none of {len(probes)} images of {annotation_file} is in this folder, "
                f"for example {probes[0]}; {HOW_TO_GET}"
            )

    def load(self, path: str) -> Image.Image | Skipped:
        """The image as RGB, or why it cannot be read."""
        return load_image(self.find(path))


def load_image(path: Path) -> Image.Image | Skipped:
    """The image as RGB, or why it cannot be read."""
    return decode_image(path, str(path))


def decode_image(file: Path | BinaryIO, name: str) -> Image.Image | Skipped:
    """The image in a file as RGB, or why it cannot be read; `name` is what it is listed under."""
    try:
        with Image.open(file) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = f"{type(error).__name__}: {error}".replace(repr(file), name)  # not an object's address
        return Skipped(name, " ".join(reason.split()))
