"""In which types a model's tensors were published: they compute in float32 or better, and are written as they came."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from models.checkpoint import HALF, half_dtypes, read_weights
from sparsity.view import canonical

NAMES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # of safetensors
SINGLE = ("model.safetensors", "pytorch_model.bin")  # as transformers names its files


def widened(model: nn.Module) -> dict[str, torch.dtype]:
    """Tensors in half precision become float32, in place; the dtypes that they had, by name. Wider ones stay."""
    found = half_dtypes(model.state_dict())
    model._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
    return found


def published_dtypes(name: str, model: nn.Module) -> dict[str, torch.dtype]:
    """Name of each floating-point tensor of a model of transformers -> its dtype in the files of the model `name`, a
    folder or on the hub. Where the files have other names for it: the widest dtype that they have.
    """
    found: dict[str, torch.dtype] = {}
    for path in _files(name):
        found |= dict(_dtypes_in(path))
    if not found:
        return {}
    widest = max(found.values(), key=lambda dtype: torch.finfo(dtype).bits)
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


def _files(name: str) -> list[Path]:
    """The files with the weights, as they lie in the folder or in the cache of the hub after they have been loaded."""
    for single in SINGLE:
        path = _here(name, single)
        if path:
            return [path]
        stem, suffix = single.rsplit(".", 1)
        index = _here(name, f"{single}.index.json")
        if index:
            return sorted(index.parent.glob(f"{stem}-*-of-*.{suffix}"))
    return []


def _here(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


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
