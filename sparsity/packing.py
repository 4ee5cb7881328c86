"""Packed storage of sparse weights, as tensors for a safetensors file: the values that are kept, and where they belong.

A weight under `name` becomes `name.values` and, by whichever is smallest,

- N:M: `name.indices`, the place in its group of each of the N values of M consecutive weights, ceil(log2 M) bits each
  (2:4 in 16 bits is 9/16 of the dense size);
- blocks of weights (a pattern such as block4x4, `values` block by block): `name.bitmask`, a bit for each block;
- any other sparsity: `name.bitmask`, a bit for each weight, 1 where it is kept.

Bits fill bytes from the lowest on. The file's metadata has, as JSON under "packed", of each such weight its shape, its
pattern (null: bitmask) and, for N:M, the dimension that the groups run along. All other tensors are as they were. Under
"packed_digest" stands the SHA-256 of that JSON and all tensors, sorted by name (`sparsity.bits.tensors_digest`); it is
verified where the file is unpacked. Older files lack it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.bits import tensors_digest, to_bits, to_bytes
from sparsity.casting import FLOATS
from sparsity.errors import UserError
from sparsity.pattern import NM, Block, pattern_of, patterns_of

PACKED, DIGEST = "packed", "packed_digest"  # keys of the metadata
_FORMAT = {"format": "pt"}
BLOCKS = (Block(4, 4), Block(16, 16), Block(4, 1), Block(1, 4))  # that are looked for in zeros
_VALUES, _INDICES, _BITMASK = ".values", ".indices", ".bitmask"


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, of tensors on the processor.

    Matrices of 16 bits or more, and what has more dimensions, are packed where that is smaller; a zero comes back as
    +0, all other values bit by bit. Quantised ones, such as float8, are as they were.
    """
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        layout = _smallest(tensor) if tensor.dtype in FLOATS and tensor.ndim > 1 else None
        if layout is None:
            tensors[name] = tensor.clone().contiguous()
            continue
        layouts[name] = {"shape": list(tensor.shape), **layout}
        encode = {NM: _pack_groups, Block: _pack_blocks}.get(type(pattern_of(layout["pattern"])), _pack_mask)
        tensors |= {name + kind: part for kind, part in encode(tensor, layout).items()}
    text = json.dumps(layouts)
    return tensors, {**_FORMAT, PACKED: text, DIGEST: _digest(tensors, text)}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The state dict that was packed; tensors of a file without packed ones come back as they are.

    Raises UserError, naming the weight where it is one, where a file does not fit what it says or is not as it was
    written.
    """
    metadata = metadata or {}
    text, digest = metadata.get(PACKED, "{}"), metadata.get(DIGEST)
    # A file has both entries; an older one has no others, so that none whose name is damaged is passed over.
    own = metadata.keys() - _FORMAT.keys()
    if (DIGEST in own and PACKED not in own) or (PACKED in own and DIGEST not in own and own != {PACKED}):
        raise UserError("the description of its packed weights is damaged")
    layouts = _layouts(text)
    parts = {name + kind for name in layouts for kind in (_VALUES, _INDICES, _BITMASK)}
    state = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, layout in layouts.items():
        try:
            decode = {NM: _unpack_groups, Block: _unpack_blocks}.get(type(pattern_of(layout["pattern"])), _unpack_mask)
            kinds = [kind for kind in (_VALUES, _INDICES, _BITMASK) if name + kind in tensors]
            state[name] = decode({kind: tensors[name + kind] for kind in kinds}, layout)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"the packed weight {name!r} is damaged") from error
    if digest is not None and digest != _digest(tensors, text):
        raise UserError("its tensors do not match the digest that was written with them: it is damaged")
    return state


def _layouts(text: str) -> dict[str, Any]:
    try:
        layouts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("the description of its packed weights is damaged") from error
    if not isinstance(layouts, dict):
        raise UserError("the description of its packed weights is damaged")
    return layouts


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    return tensors_digest(dict(sorted(tensors.items())), text)


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
    for block in BLOCKS if tensor.ndim == 2 and kept < 1 else ():
        if block.fits(tensor.shape):
            used = float(block.reduce((tensor != 0).float()).count_nonzero()) * block.numel / tensor.numel()
            sizes.append((used * width + 1 / block.numel, {"pattern": str(block)}))
    return min(sizes, key=lambda entry: entry[0])[1]


def _pattern(layout: Mapping[str, Any]) -> NM:
    pattern = pattern_of(layout["pattern"])
    if not isinstance(pattern, NM):
        raise UserError("its groups have no pattern")
    return pattern


def _bits(pattern: NM) -> int:
    return math.ceil(math.log2(pattern.m))


def _pack_mask(tensor: Tensor, _: Mapping[str, Any]) -> dict[str, Tensor]:
    kept = tensor != 0
    return {_VALUES: tensor[kept], _BITMASK: to_bytes(kept.numpy())}


def _unpack_mask(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    kept = to_bits(parts[_BITMASK], math.prod(layout["shape"]))
    values = parts[_VALUES]
    if kept.sum() != len(values):
        raise UserError("there are more or fewer values than bits")
    result = values.new_zeros(layout["shape"])
    result[torch.from_numpy(kept).bool().view(layout["shape"])] = values
    return result


def _pack_blocks(tensor: Tensor, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    block = _block(layout)
    parts = tensor.unflatten(1, (-1, block.columns)).unflatten(0, (-1, block.rows))  # (out / R, R, in / C, C)
    parts = parts.movedim(1, 2)  # (out / R, in / C, R, C)
    kept = parts.count_nonzero((2, 3)) > 0
    return {_VALUES: (parts[kept] + 0.0).reshape(-1), _BITMASK: to_bytes(kept.numpy())}  # -0 + 0 is +0


def _unpack_blocks(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    block, (rows, columns) = _block(layout), layout["shape"]
    if not block.fits((rows, columns)):
        raise UserError("its shape does not divide into blocks")
    across = (rows // block.rows, columns // block.columns)
    kept = torch.from_numpy(to_bits(parts[_BITMASK], math.prod(across))).bool().view(across)
    values = parts[_VALUES]
    if int(kept.sum()) * block.numel != len(values):
        raise UserError("there are more or fewer values than blocks")
    result = values.new_zeros(*across, block.rows, block.columns)
    result[kept] = values.view(-1, block.rows, block.columns)
    return result.movedim(2, 1).reshape(rows, columns)


def _block(layout: Mapping[str, Any]) -> Block:
    pattern = pattern_of(layout["pattern"])
    if not isinstance(pattern, Block):
        raise UserError("its blocks have no pattern")
    return pattern


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
    if values.numel() * pattern.m != math.prod(shape) * pattern.n:
        raise UserError("there are more or fewer values than the shape says")
    binary = to_bits(parts[_INDICES], values.numel() * bits).reshape(-1, bits)
    places = torch.from_numpy((binary.astype(np.int64) << np.arange(bits)).sum(axis=1)).view(-1, pattern.n)
    if not (places.diff(dim=1) > 0).all():
        raise UserError("two values have one place")
    result = values.new_zeros(len(places), pattern.m).scatter_(1, places, values.view(-1, pattern.n))
    return result.view(shape) if layout["dim"] else result.view(shape[::-1]).t().contiguous()
