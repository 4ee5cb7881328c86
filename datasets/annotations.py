"""Annotation files and image folders in the public layouts, checked when they are opened."""

from __future__ import annotations

import json
import os
import pickle
import reprlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.decoding import Decoding
from datasets.collate import Skipped
from datasets.images import DEFAULT, load_image
from sparsity.errors import MissingFileError, UserError
from sparsity.files import reading

HOW_TO_GET = "docs/datasets.md says how to get the annotations and images"
_PROBES = 64  # image paths that are looked up at start-up
_KEYS = 8  # of a record that are told
_DIGITS = 18  # of a number that stands as a text
_LARGEST = 1e300  # pixels


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
    records = read_json(path, f"a JSON list of {expected}")
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
    for dataset, record in read_records(path, lambda record: (_dataset(record), parse(record)), expected):
        found.setdefault(folders.get(dataset, folders[""]), []).append(record)
    return list(found.items())


def _dataset(record: dict) -> str:
    return get_text(record, "dataset") if "dataset" in record else ""


def read_json(path: str | Path, expected: str) -> Any:
    """Return what a JSON file holds, which is to be what is `expected`.

    Raises FileNotFoundError, or UserError where it is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: annotation file not found; expected {expected}; {HOW_TO_GET}")
    try:
        with reading(path):
            content = path.read_bytes()
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); expected {expected}; {HOW_TO_GET}") from None


def parse_json(content: bytes | str) -> Any:
    """Return what JSON says. UserError where it is damaged, not UTF-8, or so deeply nested that it is no data."""
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError("brackets in brackets, too many to be read") from None
    except ValueError as error:
        raise UserError(str(error)) from None


_SHOWN = reprlib.Repr()  # stops at a depth, where repr() itself may run out of stack, and writes no megabytes
_SHOWN.maxstring = _SHOWN.maxother = 60


def shown(value: Any) -> str:
    """Return the beginning of a JSON value, for messages."""
    return _SHOWN.repr(value)[:60]


def _parsed(path: str | Path, i: int, record: Any, parse: Callable[[dict], Any], expected: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{path}: record {i} is {shown(record)}; expected {expected}")
    try:
        return parse(record)
    except ValueError as error:
        raise UserError(f"{path}: record {i}: {error}; expected {expected}") from None


def get_text(record: dict, key: str, *, blank: bool = False) -> str:
    """Text under a key; raises UserError where there is none, or, unless it may be `blank`, no word in it."""
    if key not in record:
        raise UserError(f"no key {key!r} (it has {', '.join(map(shown, islice(record, _KEYS))) or 'none'})")
    if not isinstance(record[key], str):
        raise UserError(f"{key!r} must be a text, got {shown(record[key])}")
    return check_text(record[key], key, blank=blank)


def get_texts(record: dict, key: str, *, blank: bool = False) -> list[str]:
    """Texts under a key that holds one or a list of them, at least one; raises UserError as `get_text`."""
    value = record.get(key)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return [check_text(text, key, blank=blank) for text in value]
    if isinstance(value, list):
        raise UserError(f"{key!r} must be a text or a list of at least one text, got {shown(value)}")
    return [get_text(record, key, blank=blank)]


def check_text(text: str, key: str, *, blank: bool = False) -> str:
    """The text; raises UserError where it has halves of characters, which JSON can say and nothing can write, or where
    it is empty and must not be `blank`.
    """
    if not blank and not text.strip():
        raise UserError(f"{key!r} must not be empty, got {text[:20]!r}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UserError(f"{key!r} has half a character (lone surrogate), {half!r}, at {error.start}") from None
    return text


def get_path(record: dict, key: str = "image") -> str:
    """Path of an image; raises UserError where there is none, or one that no file can have."""
    path = get_text(record, key)
    if "\0" in path:
        raise UserError(f"{key!r} must be a path, got {path[:60]!r}")
    return path


def get_id(record: dict, key: str = "image_id") -> int | str | None:
    """Number or text under a key, a number also where it stands as a text ("007" is 7); None where there is no such
    key. Raises UserError where it is anything else: null would make all images the same one.
    """
    if key not in record:
        return None
    value = record[key]
    if isinstance(value, str) and len(value) <= _DIGITS and value.isdecimal():
        return int(value)
    if isinstance(value, str):
        return check_text(value, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{key!r} must be a number or a text, got {shown(value)}")
    return value


def get_box(value: Any) -> tuple[float, float, float, float]:
    """The box [x, y, width, height] in pixels; raises UserError where it is none."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise UserError(f"a box 'bb' must be [x, y, width, height] in pixels, got {shown(value)}")
    return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    """Whether this is a number, neither NaN nor too large to be a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


class ImageRoot:
    """A folder of images, with paths of both public kinds: relative to the folder, or already starting with it.

    decoding: how they become pictures. Raises FileNotFoundError where the folder is missing.
    """

    def __init__(self, root: str | Path, decoding: Decoding = DEFAULT):
        self.root, self.decoding = Path(os.path.abspath(root)), decoding
        if not self.root.is_dir():
            raise MissingFileError(f"{root}: image folder not found; {HOW_TO_GET}")

    def find(self, path: str) -> Path:
        """Return the path of an image; the path in this folder if it is nowhere."""
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
        return load_image(self.find(path), self.decoding)
