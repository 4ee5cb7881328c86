"""Weights and models that load without this project."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.tensor_stream import write_stream
from sparsity.bits import recipes_of
from sparsity.casting import cast, casting
from sparsity.errors import UserError
from sparsity.files import INDEX, SAVED, replacing_folder, weights_files
from sparsity.packing import Packed
from sparsity.view import canonical

log = logging.getLogger(__name__)

FORMAT = {"format": "pt"}  # metadata without which transformers does not read a file


def save_weights(
    model: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    halves: Mapping[str, torch.dtype] | None = None,
    without: Sequence[str] = (),
    tied_once: bool = False,
    allowed: Collection[str] = (),
) -> Path:
    """Write the state dict as safetensors, floating-point tensors as `dtype`; by default each as it is, or as `halves`
    says (see `sparsity.view.PrunableView`).

    without: globs over names that are left out. tied_once: a tied tensor stands under its first name alone, which
    `models.checkpoint.load_weights` understands; by default under each, as other programs want it. allowed: what the
    cast may lose, see `sparsity.casting.cast`, whose UserError names the file.
    """
    state, targets, seen = {}, {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(fnmatchcase(name, glob) for glob in without) or (tied_once and id(tensor) in seen):
            continue
        seen.add(id(tensor))
        state[name] = tensor.detach()
        targets[name] = dtype or (halves or {}).get(canonical(name), tensor.dtype)
    try:
        state = casting(state, targets, allowed=allowed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    save_state(state, path)
    return Path(path)


def save_state(state: Mapping[str, Tensor], path: str | Path, *, packed: bool = False) -> None:
    """Write tensors as safetensors, one at a time where they are made when they are asked for (`MadeTensors`). packed:
    zeros are left out (`sparsity.packing`); `models.checkpoint.read_weights` reads both.
    """
    if packed:
        save_packed(Packed(state), path)
        return
    specs = {name: (recipe.dtype, recipe.shape) for name, recipe in recipes_of(state).items()}
    write_stream(path, specs, state.items(), lambda: FORMAT)


def save_packed(packed: Packed, path: str | Path) -> None:
    """Write a packed state dict."""
    write_stream(path, packed.specs, packed.tensors(), packed.metadata)


@contextmanager
def as_published(model: nn.Module, halves: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The model inside the block with its tensors in the dtypes that its source has; afterwards with its own again."""
    tensors = {key: tensor for key, tensor in _tensors(model) if key in halves}
    narrow = cast({key: tensor.detach() for key, tensor in tensors.items()}, halves, allowed=("vanished",))
    before = [(tensor, tensor.data) for tensor in {id(tensor): tensor for tensor in tensors.values()}.values()]
    try:
        for key, tensor in tensors.items():
            tensor.data = narrow[key]
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Canonical name and tensor: parameters and buffers themselves, under all their names."""
    return ((canonical(name), tensor) for name, tensor in model.state_dict(keep_vars=True).items())


def save_model(model: nn.Module, path: str | Path, halves: Mapping[str, torch.dtype] | None = None) -> Path:
    """Write a model as its own library loads it: for transformers a folder `path`, with the processor where the model's
    own is here, else its state dict in `path`.safetensors. halves: of `sparsity.view.PrunableView`.
    """
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return save_weights(model, f"{path}.safetensors", halves=halves, allowed=("vanished",))
    own = model.config.dtype
    with replacing_folder(path) as temporary:
        with as_published(model, halves or {}):
            model.save_pretrained(temporary, **_sharding(model.name_or_path))
        model.config.dtype = own  # what is in memory is not what was written
        _save_processor(model.name_or_path, temporary)
    return Path(path)


def _sharding(name: str) -> dict[str, int]:
    """Return the options of save_pretrained that cut the weights as the files that they came from: shards are as large
    as the largest of those.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in SAVED:
        index = f"{file}{INDEX}"
        found = Path(name, index) if Path(name).is_dir() else try_to_load_from_cache(name, index)
        if isinstance(found, str | Path) and Path(found).is_file():
            return {"max_shard_size": max(map(_data_bytes, weights_files(found)))}
    return {}


def _data_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a file: without the header of safetensors."""
    if path.suffix != ".safetensors":
        return path.stat().st_size
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _save_processor(name: str, folder: Path) -> None:
    import transformers

    try:
        transformers.AutoProcessor.from_pretrained(name, local_files_only=True).save_pretrained(folder)
    except Exception:  # whatever a missing or foreign file makes of it: the weights are what was asked for
        log.info("%s has no processor here: the saved model comes without one", name)
