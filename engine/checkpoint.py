"""Training checkpoints: one file that is always whole, and says which configuration it belongs to."""

from pathlib import Path
from typing import Any

import torch

from engine.files import replacing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and texts so that a kill at any moment leaves the old file or the new one."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, to the CPU, without unpickling code. ValueError names an unreadable file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is not one of its own
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
