"""The description beside the masks in a file that `sparsity.masks` writes, and how it is checked. Needs no torch."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open

from sparsity.errors import UserError

WEIGHT, _BIAS = ".weight_pruning_mask", ".bias_pruning_mask"  # keys of public files
_NESTS = ("model", "model_state", "state_dict", "student")
METADATA = "sparsity"  # the one entry of the file's metadata
_FORMAT = 1
_NEEDED = {"shapes", "aliases", "digest", "provenance"}
_FIELDS = _NEEDED | {"format", "ties", "checksum"}


class BadFileError(Exception):
    """Why a file cannot be read as masks."""


@contextmanager
def named(path: str | os.PathLike) -> Iterator[None]:
    """Turn a BadFileError inside the block into a one-line UserError that names the file."""
    try:
        yield
    except BadFileError as error:
        raise UserError(f"{str(path)!r} is not a usable mask file: {error}") from error.__cause__


def write_description(shapes: list[list], aliases: Mapping, ties: str, digest: str, provenance: Mapping) -> str:
    """Return the JSON, with a checksum over all the rest of it."""
    fields = {"format": _FORMAT, "shapes": shapes, "aliases": aliases, "ties": ties}
    fields = json.loads(json.dumps(fields | {"digest": digest, "provenance": provenance}))
    return json.dumps(fields | {"checksum": _checksum(fields)}, sort_keys=True)


def read_description(text: str) -> dict[str, Any]:
    """Parse the JSON and check it. Files without a checksum are of older versions.

    Raises:
        BadFileError: it is not JSON, lacks a field, or is not what was written.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFileError("its description is damaged") from error
    if not isinstance(fields, dict) or not _NEEDED <= fields.keys() <= _FIELDS:
        raise BadFileError("its description is damaged")
    if fields.get("format", _FORMAT) != _FORMAT:
        raise BadFileError(f"its format is {fields['format']!r:.20}, and only {_FORMAT} is known")
    whole = _checksum({key: value for key, value in fields.items() if key != "checksum"})
    if fields.get("checksum", whole) != whole or not _shapes(fields["shapes"]) or not _aliases(fields["aliases"]):
        raise BadFileError("its description is damaged")
    if not isinstance(fields["provenance"], dict):
        raise BadFileError("its description is damaged")
    return fields


@contextmanager
def opened(path: str | os.PathLike, framework: str) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Open a safetensors file, with its checked description, or None where it has none.

    Raises BadFileError where what is in the file, or read from it in the block, is not as described.
    """
    try:
        with safe_open(path, framework=framework) as file:
            text = (file.metadata() or {}).get(METADATA)
            description = None if text is None else read_description(text)
            if description:
                _check_tensors(description, file)
            yield file, description
    except BadFileError:
        raise
    except Exception as error:  # safetensors raises several kinds
        raise BadFileError("it is truncated or damaged") from error


def _check_tensors(description: Mapping[str, Any], file: Any) -> None:
    if set(file.keys()) != {name for name, _ in description["shapes"]}:
        raise BadFileError("its description is of other tensors than it holds")
    for name, shape in description["shapes"]:
        packed = file.get_slice(name)
        if packed.get_dtype() != "U8" or math.prod(packed.get_shape()) != -(-math.prod(shape) // 8):
            raise BadFileError(f"the mask of {name!r:.200} has more or fewer bits than its shape says")


def begin_digest(shapes: list[list]) -> Any:
    """Return the SHA-256 that the packed masks are to be added to, in order."""
    return hashlib.sha256(json.dumps(shapes, separators=(",", ":")).encode())


def check_digest(sha: Any, description: Mapping[str, Any]) -> None:
    """Raise BadFileError where masks are not those that were written."""
    if sha.hexdigest() != description["digest"]:
        raise BadFileError("its masks do not match the digest that was written with them")


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _shapes(shapes: Any) -> bool:
    """Whether these are pairs of a name and a shape that can be, no name twice."""
    pairs = isinstance(shapes, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in shapes)
    if not pairs or not all(isinstance(name, str) and isinstance(shape, list) for name, shape in shapes):
        return False
    sizes = all(type(side) is int and side >= 0 for _, shape in shapes for side in shape)
    return sizes and len({name for name, _ in shapes}) == len(shapes)


def _aliases(aliases: Any) -> bool:
    return isinstance(aliases, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in aliases.values()
    )


def public_entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield the mask entries of a public file, bare or nested."""
    while isinstance(content, Mapping):
        entries = [(k, v) for k, v in content.items() if isinstance(k, str) and k.endswith((WEIGHT, _BIAS))]
        if entries:
            yield from entries
            return
        content = next((content[nest] for nest in _NESTS if nest in content), None)
