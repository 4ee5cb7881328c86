"""Packed storage of sparse weights, as tensors for a safetensors file: the values that are kept, and where they belong.

A weight under `name` becomes `name.values` and, by whichever is smallest,

- N:M: `name.indices`, the place in its group of each of the N values of M consecutive weights, ceil(log2 M) bits each
  (2:4 in 16 bits is 9/16 of the dense size);
- any other sparsity: `name.bitmask`, a bit for each weight, 1 where it is kept.

Bits fill bytes from the lowest on. The file's metadata has, as JSON under "packed", of each such weight its shape, its
pattern (null: bitmask) and, for N:M, the dimension that the groups run along. All other tensors are as they were.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.bits import to_bits, to_bytes
from sparsity.errors import UserError
from sparsity.pattern import NM, parse_pattern, patterns_of

PACKED = "packed"  # key of the metadata
_VALUES, _INDICES, _BITMASK = ".values", ".indices", ".bitmask"


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, of tensors on the processor.

    Floating-point matrices, and what has more dimensions, are packed where that is smaller; a zero comes back as +0,
    all other values bit by bit.
    """
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        layout = _smallest(tensor) if tensor.is_floating_point() and tensor.ndim > 1 else None
        if layout is None:
            tensors[name] = tensor.clone().contiguous()
            continue
        layouts[name] = {"shape": list(tensor.shape), **layout}
        encode = _pack_mask if layout["pattern"] is None else _pack_groups
        tensors |= {name + kind: part for kind, part in encode(tensor, layout).items()}
    return tensors, {"format": "pt", PACKED: json.dumps(layouts)}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The state dict that was packed; tensors of a file without packed ones come back as they are.

    Raises UserError, naming the weight, where a file does not fit what it says.
    """
    try:
        layouts = dict(json.loads((metadata or {}).get(PACKED, "{}")))
    except (ValueError, TypeError) as error:
        raise UserError("the description of its packed weights is damaged") from error
    parts = {name + kind for name in layouts for kind in (_VALUES, _INDICES, _BITMASK)}
    state = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, layout in layouts.items():
        try:
            decode = _unpack_mask if layout["pattern"] is None else _unpack_groups
            kinds = [kind for kind in (_VALUES, _INDICES, _BITMASK) if name + kind in tensors]
            state[name] = decode({kind: tensors[name + kind] for kind in kinds}, layout)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"the packed weight {name!r} is damaged") from error
    return state


def _smallest(tensor: Tensor) -> dict[str, Any] | None:
    """The layout that takes the fewest bits; None where that is the dense one."""
    width = 8 * tensor.element_size()
    kept = int(tensor.count_nonzero()) / max(1, tensor.numel())
    sizes: list[tuple[float, dict[str, Any] | None]] = [(width, None)]  # the first of equal ones is taken
    for dim in (1, 0) if tensor.ndim == 2 else ():
        for pattern in patterns_of([tensor if dim else tensor.t()]):
            bits = pattern.n / pattern.m * (width + _bits(pattern))
            sizes.append((bits, {"pattern": str(pattern), "dim": dim}))
    sizes.append((kept * width + 1, {"pattern": None}))
    return min(sizes, key=lambda entry: entry[0])[1]


def _pattern(layout: Mapping[str, Any]) -> NM:
    pattern = parse_pattern(layout["pattern"])
    if pattern is None:
        raise UserError("its groups have no pattern")
    return pattern


def _bits(pattern: NM) -> int:
    return math.ceil(math.log2(pattern.m))


def _pack_mask(tensor: Tensor, _: Mapping[str, Any]) -> dict[str, Tensor]:
    kept = tensor != 0
    return {_VALUES: tensor[kept], _BITMASK: to_bytes(kept.numpy())}


def _unpack_mask(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    kept = _checked_bits(parts[_BITMASK], math.prod(layout["shape"]))
    values = parts[_VALUES]
    if kept.sum() != len(values):
        raise UserError("there are more or fewer values than bits")
    result = values.new_zeros(layout["shape"])
    result[torch.from_numpy(kept).bool().view(layout["shape"])] = values
    return result


def _pack_groups(tensor: Tensor, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    pattern = _pattern(layout)
    groups = (tensor if layout["dim"] else tensor.t()).reshape(-1, pattern.m)
    # Those that are not zero first; where they are fewer than N, zeros fill up.
    places = (groups == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : pattern.n].sort(dim=1).values
    binary = places.reshape(-1, 1).numpy() >> np.arange(_bits(pattern)) & 1
    return {_VALUES: groups.gather(1, places) + 0.0, _INDICES: to_bytes(binary)}  # -0 + 0 is +0


def _unpack_groups(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    pattern, shape = _pattern(layout), layout["shape"]
    values, bits = parts[_VALUES], _bits(pattern)
    binary = _checked_bits(parts[_INDICES], values.numel() * bits).reshape(-1, bits)
    places = torch.from_numpy((binary.astype(np.int64) << np.arange(bits)).sum(axis=1)).view(-1, pattern.n)
    result = values.new_zeros(math.prod(shape) // pattern.m, pattern.m)
    result = result.scatter_(1, places, values.view(-1, pattern.n))
    if places.shape[0] != result.shape[0]:
        raise UserError("there are more or fewer values than the shape says")
    return result.view(shape) if layout["dim"] else result.view(shape[::-1]).t().contiguous()


def _checked_bits(packed: Tensor, count: int) -> np.ndarray:
    if packed.numel() != -(-count // 8):
        raise UserError("there are more or fewer bits than the shape says")
    return to_bits(packed, count)
