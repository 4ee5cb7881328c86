"""Files with what a run has done so far, which are read again only where every byte is as it was written."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from sparsity.bits import ShapedTensors, tensors_digest
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

logger = logging.getLogger(__name__)

_DIGEST = "digest"


class StoredTensors(ShapedTensors):
    """Tensors in safetensors files, one of which is read at a time, into memory of its own.

    Files are opened when they are added, and stay open: what they held then can be read as long as this lives, also
    after they were removed or replaced (whole, as `save_kept` does).
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[Any, str, tuple[int, ...]]] = {}  # name -> open file, key, shape

    def add(self, path: Path, keys: Mapping[str, str]) -> None:
        """Add the tensors of a file that is whole: name -> key in the file.

        Raises MissingFileError where there is no such file, and UserError where it is damaged or lacks a key.
        """
        if not path.is_file():
            raise MissingFileError(f"{path}: file not found")
        try:
            file = safe_open(path, framework="pt")
        except Exception as error:  # safetensors raises several kinds
            raise UserError(f"{path}: damaged, or cannot be read ({error})") from error
        missing = [key for key in keys.values() if key not in file.keys()]  # noqa: SIM118 (not a dict)
        if missing:
            raise UserError(f"{path}: has no tensor {missing[0]!r}")
        for name, key in keys.items():
            self._places[name] = file, key, tuple(file.get_slice(key).get_shape())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][2]

    def __getitem__(self, name: str) -> Tensor:
        file, key, _ = self._places[name]
        return file.get_tensor(key).clone()  # tensors of a file share memory: who writes to one would change the next

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def save_kept(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts, whole or not at all. facts: "identity" says what they belong to."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, serialize(tensors, {**facts, _DIGEST: _digest(tensors, facts)}))


def load_kept(
    path: Path, identity: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and facts; None where there is no such file, or one of another identity, or a damaged one, so that
    a run computes it again.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            if facts.get("identity") != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception:  # safetensors raises several kinds
        logger.warning("%s: damaged, and computed again", path)
        return None
    if facts.pop(_DIGEST, None) != _digest(tensors, facts):
        logger.warning("%s: damaged, and computed again", path)
        return None
    return {name: tensor.to(device) for name, tensor in tensors.items()}, facts


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    return tensors_digest(dict(sorted(tensors.items())), json.dumps(facts, sort_keys=True))
