"""Load public and own checkpoints into a model: unpack wrappers, strip prefixes, interpolate positions."""

import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.hub import first_line, hub_answers
from sparsity.bits import MadeTensors, Recipe, recipes_of
from sparsity.errors import MissingFileError, UserError, listed
from sparsity.files import INDEX, SAVED, reading, shard_names, weights_files
from sparsity.learned.checkpoint import GATE, fold
from sparsity.packing import unpacking
from sparsity.view import canonical

log = logging.getLogger(__name__)

WRAPPERS = ("model", "model_state", "state_dict", "student")  # keys under which public checkpoints hold the weights
AVERAGED = ("state_dict_ema", "model_ema")  # those of averaged weights beside them, as timm's training writes
TIMM = (*AVERAGED, "state_dict", *WRAPPERS)  # in the order in which timm looks for them: averaged ones first
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # names with these endings are files, whether or not they exist
SHOWN = 3  # names in an error message
HALF = (torch.float16, torch.bfloat16)


def find_weights(name: str | Path) -> Path:
    """The weights file, or index of shards, that a file name, a folder saved by transformers or a repository on its hub
    stands for.

    A repository ("facebook/dino-vitb16") is downloaded once and kept in the cache of huggingface_hub. Raises UserError
    where there is none.
    """
    path = Path(name)
    if path.is_dir():
        found = weights_files(path)
        if not found:
            raise MissingFileError(
                f"{path}: no weights in this folder; expected {' or '.join(SAVED)}, whole or sharded"
            )
        return found[0] if len(found) == 1 else path
    return path if path.is_file() or path.suffix in SUFFIXES else _download(str(name))


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    offline = not hub_answers()
    for file in (each for single in SAVED for each in (single, f"{single}{INDEX}")):
        try:
            path = Path(hf_hub_download(repository, file, local_files_only=offline))
            for shard in shard_names(path) if file.endswith(INDEX) else ():
                hf_hub_download(repository, shard, local_files_only=offline)  # beside the index
            return path
        except EntryNotFoundError:
            continue
        except UserError:
            raise
        except Exception as error:  # network, hub, or a malformed name
            raise UserError(f"{repository}: cannot be downloaded: {first_line(error)}") from error
    why = "is neither a folder nor in the cache, and the hub does not answer" if offline else "has no weights"
    raise MissingFileError(f"{repository}: {why}; expected {' or '.join(SAVED)}")


def read_weights(path: str | Path, wrappers: Sequence[str] = WRAPPERS, key: str = "") -> dict[str, Tensor]:
    """State dict of a safetensors file, packed or not, or a pickle (no code is unpickled), under canonical names; of a
    folder or an index of shards, the tensors of all its files.

    wrappers: keys under which the weights may stand, the first that is there counts; which one it was is logged where
    the file has several. key: the one that alone counts. Raises FileNotFoundError, or UserError where the file holds no
    weights.
    """
    return dict(stored_weights(path, wrappers, key))


def stored_weights(path: str | Path, wrappers: Sequence[str] = WRAPPERS, key: str = "") -> MadeTensors:
    """Return what `read_weights` does, without holding it: tensors are those of mapped files, and packed ones are
    unpacked each time they are asked for.
    """
    path, files = Path(path), weights_files(path)
    if not files:
        raise MissingFileError(f"{path}: weights file not found")
    found: dict[str, Recipe] = {}
    for file in files:
        found |= _stored(file, wrappers, key)
    return MadeTensors(found)


def _stored(path: Path, wrappers: Sequence[str], key: str) -> dict[str, Recipe]:
    with reading(path), path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        content = _read_safetensors(path) if is_safetensors else _read_pickle(path)
    except Exception as error:  # a damaged file makes both readers raise almost anything
        raise UserError(f"{path}: not a readable weights file: {_reason(error)}") from error
    if isinstance(content, _Safetensors):
        content = unpacking(content.tensors, content.metadata, f"{path}: ") if content.metadata else content.tensors
    content = _under(path, content, key) if key else _unwrapped(path, content, wrappers)
    if not _is_state(content) and not (isinstance(content, MadeTensors) and len(content)):
        places = repr(key) if key else f"bare or under {', '.join(map(repr, dict.fromkeys(wrappers)))}"
        raise UserError(f"{path}: expected names with tensors, {places}")
    return {canonical(name): recipe for name, recipe in recipes_of(content).items()}


def _unwrapped(path: Path, content: object, wrappers: Sequence[str]) -> object:
    """Return what stands under the first of these keys, and so on inside of it."""
    sets = _sets(content)
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            if len(sets) > 1 and wrapper in sets:
                others = ", ".join(repr(name) for name in sets if name != wrapper)
                log.warning("%s: read the weights under %r; it also has %s", path, wrapper, others)
            content = content[wrapper]
    return content


def _under(path: Path, content: object, key: str) -> object:
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        there = ", ".join(map(repr, _sets(content))) or "no key with weights: they stand there bare"
        raise UserError(f"{path}: has no weights under {key!r}; it has {there}")
    return content[key]


def _sets(content: object) -> list[str]:
    """The keys of a checkpoint with a state dict, perhaps wrapped once more."""
    found = content.items() if isinstance(content, dict) else ()
    return [name for name, value in found if _is_state(value) or (name in TIMM and isinstance(value, dict))]


def _is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


class _Safetensors(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None


def _read_safetensors(path: Path) -> _Safetensors:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return _Safetensors(load_file(path), metadata)


def _read_pickle(path: Path) -> object:
    with torch.serialization.safe_globals([Namespace]):  # training scripts leave their arguments in checkpoints
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds {refused[1]}, and only tensors and plain values are loaded, since others could run code"
    return "it is damaged, or neither safetensors nor a pickle of tensors"


@torch.no_grad()
def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    positions: Sequence[str] = (),
    ignored: Sequence[str] = (),
    optional: Sequence[str] = (),
    rename: Callable[[str], str] = str,
    wrappers: Sequence[str] = WRAPPERS,
    weights: dict[str, Tensor] | None = None,
) -> list[str]:
    """Copy the weights of a file into `model`, whose every tensor must be there, and nothing else.

    positions: names of position tables (1 + grid^2, width), interpolated where the image size differs. ignored: globs
    of names that may be missing or superfluous on either side. optional: globs of names that the file may lack; those
    that it lacks are returned. rename: name in the file -> name in the model. wrappers: of `read_weights`. weights:
    what has been made of the file already, which is not read then. A tied tensor may stand under any of its names.
    Raises UserError naming the first tensors that don't fit; the model is not changed then.
    """
    weights = read_weights(path, wrappers) if weights is None else weights
    if any(name.endswith(GATE) and f"{name.removesuffix(GATE)}.weight" in weights for name in weights):
        weights = fold(weights)  # learned masks become zeros
    weights = {rename(name): t for name, t in weights.items()}
    weights = {name: t for name, t in weights.items() if not _matches(name, ignored)}
    state = {canonical(name): t for name, t in model.state_dict(keep_vars=True).items()}
    for name in positions:
        if name in weights and name in state:
            weights[name] = fit_positions(weights[name], state[name])
    misfits = {kind: names for kind, names in _misfits(weights, state, (*ignored, *optional)).items() if names}
    if misfits:
        told = "; ".join(f"{len(names)} {kind}: {listed(names, SHOWN)}" for kind, names in misfits.items())
        raise UserError(f"{path}: weights of another model: {told}")
    narrower = [n for n, t in weights.items() if torch.promote_types(t.dtype, state[n].dtype) != state[n].dtype]
    if narrower:
        told = f"{weights[narrower[0]].dtype} to {state[narrower[0]].dtype}"
        log.warning("%s: %d tensors are narrowed, from %s: %s", path, len(narrower), told, listed(narrower))
    for name, tensor in weights.items():
        state[name].data.copy_(tensor)
    return [name for name in state if name not in weights and _matches(name, optional)]


def half_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Name -> dtype of the tensors in half precision, which models compute with in float32."""
    return {canonical(name): tensor.dtype for name, tensor in tensors.items() if tensor.dtype in HALF}


def _misfits(weights: dict[str, Tensor], state: dict[str, Tensor], ignored: Sequence[str]) -> dict[str, list[str]]:
    """List why the weights of a file do not fit a model, whose tied tensors are one object in `state`."""
    misshapen, tied, first = [], [], {}
    for name, tensor in weights.items():
        if name in state and tensor.shape != state[name].shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} (expected {tuple(state[name].shape)})")
        elif name in state:
            other = first.setdefault(id(state[name]), name)
            if other != name and not torch.equal(tensor, weights[other]):
                tied.append(name)
    given = {id(state[name]) for name in weights if name in state}
    missing = [name for name, t in state.items() if id(t) not in given and not _matches(name, ignored)]
    unexpected = [name for name in weights if name not in state]
    return {"misshapen": misshapen, "missing": missing, "unexpected": unexpected, "different though tied": tied}


def image_size_of(path: str | Path, positions: Sequence[str], patch_size: int) -> int | None:
    """Return the side in pixels of the images that a checkpoint's position table is for; None where it has none.

    positions: names that the table may have.
    """
    stored = stored_weights(path)
    table = next((stored.shape(name) for name in positions if name in stored), (0, 0))
    return _grid(table[-2]) * patch_size or None


def fit_positions(table: Tensor, expected: Tensor) -> Tensor:
    """A position table (1 + grid^2, width), or (1, 1 + grid^2, width), for the grid of another; as it is where it is
    none, or of another width.
    """
    if table.ndim == expected.ndim == 3 and len(table) == len(expected) == 1:
        return fit_positions(table[0], expected[0])[None]
    tables = table.ndim == expected.ndim == 2 and table.shape[1] == expected.shape[1]
    differ = tables and len(table) != len(expected) and _grid(len(table)) and _grid(len(expected))
    return interpolate_positions(table, len(expected)) if differ else table


def interpolate_positions(table: Tensor, tokens: int) -> Tensor:
    """Position table (1 + g^2, width) -> (tokens, width): bicubic over the grid, the class token apart."""
    old, new = _grid(len(table)), _grid(tokens)
    if not old or not new:
        raise UserError(
            f"position tables must hold a class token and a square grid, got {len(table)} and {tokens} rows"
        )
    grid = table[1:].float().t().reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:1].float(), grid.flatten(2)[0].t()]).to(table.dtype)


def _grid(tokens: int) -> int:
    """Side of the square grid beside a class token; 0 where there is none."""
    side = math.isqrt(max(0, tokens - 1))
    return side if side * side + 1 == tokens else 0


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
