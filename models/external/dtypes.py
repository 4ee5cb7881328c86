"""In which types a model's tensors were published, which it computes in, and which it is written in: as they came."""

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.checkpoint import read_weights
from sparsity.files import INDEX, SAVED, weights_files
from sparsity.view import canonical

NAMES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # of safetensors


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Return the name of each floating-point tensor -> its dtype."""
    return {canonical(name): tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}


def wanted(dtype: str, came: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """Return what a model computes in whose weights came in these dtypes; None where they say nothing.

    dtype: "auto", the widest of them; "float32", or float64 where they have that; "bfloat16"; "float16".
    """
    if dtype in ("bfloat16", "float16"):
        return getattr(torch, dtype)
    widest = _widest(came.values())
    if dtype == "auto":
        return widest
    return torch.float64 if widest == torch.float64 else torch.float32


def compute_in(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give a model's floating-point tensors this dtype, in place.

    Buffers of transformers that are in no checkpoint (the frequencies of rotary positions) stay as they are made, as
    its own loading has it.
    """
    if dtype is None:
        return
    foreign = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    kept = {id(t) for t in model.buffers()} - {id(t) for t in model.state_dict(keep_vars=True).values()}
    model._apply(
        lambda tensor: (
            tensor.to(dtype) if tensor.is_floating_point() and not (foreign and id(tensor) in kept) else tensor
        )
    )
    if foreign:
        model.config.dtype = dtype


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """Return the narrowest type that holds the numbers of all of them (float32 for float16 and bfloat16)."""
    found = list(dtypes)
    return reduce(torch.promote_types, found) if found else None


def published_dtypes(name: str, model: nn.Module) -> dict[str, torch.dtype]:
    """Name of each floating-point tensor of a model of transformers -> its dtype in the files of the model `name`, a
    folder or on the hub. Where the files have other names for it: the widest dtype that they have.
    """
    found = file_dtypes(name)
    widest = _widest(found.values())
    if widest is None:
        return {}
    prefix = f"{model.base_model_prefix}."
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    written = _names_in_files(model, state)
    kinds = {}
    for key, tensor in state.items():
        names = (key, key.removeprefix(prefix), written.get(id(tensor), ""))
        kinds[canonical(key)] = next((found[name] for name in names if name in found), widest)
    return kinds


def _names_in_files(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[int, str]:
    """id of a tensor -> its name in a file of transformers, which renames what older files have."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions that do not rename
        return {}
    return {id(tensor): canonical(name) for name, tensor in revert_weight_conversion(model, dict(state)).items()}


def file_dtypes(name: str) -> dict[str, torch.dtype]:
    """Return the dtypes of the tensors in the files of a model of transformers, under the names there; none where they
    have not been downloaded yet.
    """
    return {key: dtype for path in _files(name) for key, dtype in _dtypes_in(path)}


def _files(name: str) -> list[Path]:
    """The files with the weights, as they lie in the folder or in the cache of the hub after they have been loaded."""
    if Path(name).is_dir():
        return weights_files(name)
    from huggingface_hub import try_to_load_from_cache

    for file in (each for single in SAVED for each in (single, f"{single}{INDEX}")):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return weights_files(found)
    return []


def _dtypes_in(path: Path) -> Iterator[tuple[str, torch.dtype]]:
    if path.suffix != ".safetensors":
        for key, tensor in read_weights(path).items():
            if tensor.is_floating_point():
                yield key, tensor.dtype
        return
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind = NAMES.get(file.get_slice(key).get_dtype())
            if kind:
                yield canonical(key), kind
