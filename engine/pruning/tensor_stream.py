"""Safetensors written one tensor at a time, for results larger than should be held in memory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsity.casting import cast
from sparsity.errors import UserError
from sparsity.files import replacing

_HEADER_ALIGNMENT = 8
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors in the order of `shapes`, each as soon as it is there: a safetensors file, whole or not at all.
    UserError where a tensor is not the one that comes next.

    dtypes: of the tensors in the file (default: float32), which must not make a number infinite.
    """
    header, offset = {}, 0
    kinds = {name: (dtypes or {}).get(name, torch.float32) for name in shapes}
    for name, shape in shapes.items():
        end = offset + kinds[name].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            if name != given or tuple(tensor.shape) != tuple(shape):
                raise UserError(f"expected {name} {tuple(shape)}, got {given} {tuple(tensor.shape)}")
            narrow = cast({name: tensor.detach()}, kinds[name], allowed=("vanished",))[name].to("cpu", kinds[name])
            file.write(narrow.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
