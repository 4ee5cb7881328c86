"""Safetensors written one tensor at a time, for results larger than should be held in memory."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsity.bits import raw
from sparsity.casting import cast
from sparsity.errors import UserError
from sparsity.files import replacing

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> type and shape
_HEADER_ALIGNMENT = 8
_NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0"},
    **{torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ"},
    **{torch.bool: "BOOL", torch.complex64: "C64"},
}


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors in floating-point types, each as soon as it is there; see `write_stream`.

    dtypes: of the tensors in the file (default: float32), which must not make a number infinite.
    """
    specs = {name: ((dtypes or {}).get(name, torch.float32), shape) for name, shape in shapes.items()}

    def narrowed() -> Iterable[tuple[str, Tensor]]:
        for name, tensor in tensors:
            kind = specs[name][0] if name in specs else tensor.dtype
            yield name, cast({name: tensor.detach()}, kind, allowed=("vanished",))[name].to("cpu", kind)

    write_stream(path, specs, narrowed())


def write_stream(
    path: str | Path,
    specs: Specs,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write a safetensors file, whole or not at all, each tensor as soon as it is there. They may come in any order;
    in the file the wider types are first, as it should be for aligned reading.

    metadata: returns that of the file when all tensors are written, and before, another that is as long.

    Raises UserError where a tensor is not announced in `specs`, is not as it says there, or is missing.
    """
    places, offset = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        if dtype not in _NAMES:
            raise UserError(f"{path}: {name} is {dtype}, which cannot be stored")
        end = offset + dtype.itemsize * torch.Size(shape).numel()
        places[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    start, missing = len(_header(places, metadata)), set(specs)
    with replacing(path) as temporary, temporary.open("wb") as file:
        for name, tensor in tensors:
            if name not in missing or (tensor.dtype, tuple(tensor.shape)) != (specs[name][0], tuple(specs[name][1])):
                raise UserError(f"{path}: {name}, {tensor.dtype} {tuple(tensor.shape)}, was not expected")
            missing.remove(name)
            file.seek(start + places[name]["data_offsets"][0])
            file.write(raw(tensor))
        if missing:
            raise UserError(f"{path}: {min(missing)} is missing")
        header = _header(places, metadata)
        assert len(header) == start, "metadata keeps its length"
        file.seek(0)
        file.write(header)


def _header(places: Mapping[str, object], metadata: Callable[[], Mapping[str, str]] | None) -> bytes:
    """Return what stands before the tensors: the length of a JSON text, and that text."""
    text = json.dumps(({"__metadata__": metadata()} if metadata else {}) | dict(places)).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
