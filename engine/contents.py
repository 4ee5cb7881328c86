"""Digests of the files that a run reads, so that a run is not continued on other data under the same names."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.shard_names import is_pattern, shard_paths
from sparsity.files import reading

_PIECE = 1 << 22  # bytes read at a time


def contents(*configs: Any) -> dict[str, Any]:
    """Return the sizes and digests of the files that configurations (dataclasses, or their keys and values) name, but
    for the sizes of a model, which are compared themselves.

    File -> {"bytes", "sha256"} for annotations, lists of answers and weights; shards -> {"files", "bytes"}. Images in
    folders are too many to be read again, and are left out.
    """
    found: dict[str, Any] = {}
    for config in configs:
        values = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
        read = {key: value for key, value in values.items() if key != "model_config"}
        for text in sorted(set(texts(read))):
            if ".tar" in text and is_pattern(text):
                sizes = [os.stat(path).st_size for path in shard_paths(text)]
                found[text] = {"files": len(sizes), "bytes": sum(sizes)}
            elif Path(text).is_file():
                stat = os.stat(text)
                found[text] = {"bytes": stat.st_size, "sha256": _sha256(text, stat.st_size, stat.st_mtime_ns)}
    return found


def classes(names: Sequence[str], samples: int) -> dict[str, Any]:
    """Describe labelled images: how many they are, and a digest of the names of their classes in their order."""
    return {"samples": samples, "classes": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def texts(value: Any) -> Iterator[str]:
    """Yield the texts in a configuration as plain values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str) and value:
        yield value


@lru_cache(maxsize=256)
def _sha256(path: str, size: int, changed: int) -> str:
    """size, changed: of the file, so that another one of the same name is read again."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
