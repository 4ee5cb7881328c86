"""Weights of public and own checkpoints into a model: wrappers unpacked, prefixes stripped, positions interpolated."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.view import canonical

WRAPPERS = ("model", "model_state", "student")  # keys under which public checkpoints hold the weights
SHOWN = 3  # names in an error message


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a safetensors file or a pickle (no code is unpickled), under canonical names.

    Raises FileNotFoundError, or ValueError where the file holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights file not found")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable weights file (safetensors, or a pickle of tensors): {reason}") from None
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected names with tensors, bare or under {', '.join(map(repr, WRAPPERS))}")
    return {canonical(name): tensor for name, tensor in content.items()}


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path, *, positions: Sequence[str] = (), ignored: Sequence[str] = ()) -> None:
    """Copy the weights of a file into `model`, whose every tensor must be there, and nothing else.

    positions: names of position tables (1 + grid^2, width), interpolated where the image size differs. ignored: globs of
    names that may be missing or superfluous on either side. Raises ValueError naming the first tensors that don't fit.
    """
    weights = {name: t for name, t in read_weights(path).items() if not _matches(name, ignored)}
    state = {canonical(name): t for name, t in model.state_dict(keep_vars=True).items()}
    for name in positions:
        if name in weights and name in state and weights[name].shape != state[name].shape:
            weights[name] = interpolate_positions(weights[name], len(state[name]))
    given = {id(state[name]) for name in weights if name in state}  # a tied tensor may stand under one of its names
    missing = [name for name, t in state.items() if id(t) not in given and not _matches(name, ignored)]
    unknown = [name for name in weights if name not in state]
    misshapen = [
        f"{name} {tuple(t.shape)} (expected {tuple(state[name].shape)})"
        for name, t in weights.items()
        if name in state and t.shape != state[name].shape
    ]
    problems = (("misshapen", misshapen), ("missing", missing), ("unexpected", unknown))
    if any(names for _, names in problems):
        told = "; ".join(f"{len(n)} {kind}: {', '.join(n[:SHOWN])}{' ...' * (len(n) > SHOWN)}" for kind, n in problems if n)
        raise ValueError(f"{path}: weights of another model: {told}")
    for name, tensor in weights.items():
        state[name].data.copy_(tensor)


def interpolate_positions(table: Tensor, tokens: int) -> Tensor:
    """Position table (1 + g^2, width) -> (tokens, width): bicubic over the grid, the class token apart."""
    old, new = round((len(table) - 1) ** 0.5), round((tokens - 1) ** 0.5)
    if old * old + 1 != len(table) or new * new + 1 != tokens:
        raise ValueError(f"position tables must hold a class token and a square grid, got {len(table)} and {tokens} rows")
    grid = table[1:].float().t().reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1].float(), grid.flatten(2)[0].t()]).to(table.dtype)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
