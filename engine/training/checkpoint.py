"""Training checkpoints: one file that is always complete and records its configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_archive, reading, replacing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and texts so that a kill at any moment leaves the old file or the new one."""
    with replacing(path) as temporary, temporary.open("wb") as file:  # opened here, so that a full disk says so
        torch.save(state, file)


def load_checkpoint(path: str | Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to the CPU, without unpickling code.

    UserError names a file that is unreadable or lacks one of `keys`.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: checkpoint not found")
    with reading(path), Path(path).open("rb"):  # whether it may be read at all
        pass
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen kinds for a file that is not one of its own
        way_out = (
            "it is truncated, damaged or another kind of file: delete it, and the run begins anew, or copy it again"
        )
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}); {way_out}") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path}: not a checkpoint of a training run, it has no {', '.join(map(repr, missing))}")
    return state


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return the differences of two configurations of plain values, as "training.lr 0.1 -> 0.2"."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys((*old, *new))
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))]
    return [] if old == new else [f"{name} {old!r} -> {new!r}"]


def plain(value: Any) -> Any:
    """Return a configuration as a checkpoint stores it: tuples become lists, so that equal ones compare equal."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
