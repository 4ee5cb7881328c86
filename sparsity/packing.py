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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity.bits import MadeTensors, Recipe, TensorsDigest, recipes_of, tensors_digest, to_bits, to_bytes
from sparsity.casting import FLOATS
from sparsity.errors import UserError
from sparsity.pattern import NM, Block, pattern_of, patterns_of

PACKED, DIGEST = "packed", "packed_digest"  # keys of the metadata
_FORMAT = {"format": "pt"}
BLOCKS = (Block(4, 4), Block(16, 16), Block(4, 1), Block(1, 4))  # that are looked for in zeros
_VALUES, _INDICES, _BITMASK = ".values", ".indices", ".bitmask"
_GROUPS = 1 << 16  # of N:M that are coded at once: a multiple of 8, so that their bits fill whole bytes


class Packed:
    """A state dict without its zeros, made one tensor at a time: no more than one weight and what is made of it is held
    where `state` makes its own when they are asked for (`sparsity.bits.MadeTensors`).

    Matrices of 16 bits or more, and what has more dimensions, are packed where that is smaller; a zero comes back as
    +0, all other values bit by bit. Quantised ones, such as float8, are as they were.

    specs: name in the file -> type and shape, known before a tensor is made. parts: weight -> the names of its tensors.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self._state, layouts = state, {}
        self.specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.parts: dict[str, list[str]] = {}
        self.dense: dict[str, int] = {}  # bytes of a weight with its zeros
        for name in state:
            tensor = state[name]
            layout = _smallest(tensor) if tensor.dtype in FLOATS and tensor.ndim > 1 else None
            if layout is None:
                own = {name: (tensor.dtype, tuple(tensor.shape))}
            else:
                layouts[name] = {"shape": list(tensor.shape), **layout.entry}
                bits = (torch.uint8, (-(-layout.bits // 8),))
                own = {name + _VALUES: (tensor.dtype, layout.shape), name + layout.kind: bits}
            self.specs |= own
            self.parts[name], self.dense[name] = list(own), tensor.nbytes
        self.layouts, self._text = layouts, json.dumps(layouts)
        self._digest = TensorsDigest(self._text)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the file in the order of their names; once, since the digest is made of them."""
        weight_of = {part: name for name, parts in self.parts.items() for part in parts}
        weight, made = "", {}
        for part in sorted(self.specs):
            if weight_of[part] != weight:
                weight = weight_of[part]
                made = self._made(weight)
            self._digest.add(part, made[part])
            yield part, made[part]

    def metadata(self) -> dict[str, str]:
        """Return that of the file, once all tensors are made; before, another of the same length."""
        return {**_FORMAT, PACKED: self._text, DIGEST: self._digest.hexadecimal()}

    def bytes(self, names: Iterable[str] | None = None) -> int:
        """Return what these weights take in the file (default: all)."""
        parts = self.specs if names is None else [part for name in names for part in self.parts[name]]
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in (self.specs[part] for part in parts))

    def _made(self, name: str) -> dict[str, Tensor]:
        tensor, layout = self._state[name].cpu(), self.layouts.get(name)
        if layout is None:
            return {name: tensor}
        encode = {NM: _pack_groups, Block: _pack_blocks}.get(type(pattern_of(layout["pattern"])), _pack_mask)
        return {name + kind: part for kind, part in encode(tensor, layout).items()}


def pack(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file, as `Packed` makes them."""
    packed = Packed(state)
    tensors = {name: tensor.clone().contiguous() for name, tensor in packed.tensors()}
    return tensors, packed.metadata()


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return the state dict that was packed; tensors of a file without packed ones come back as they are.

    Raises UserError, naming the weight where it is one, where a file does not fit what it says or is not as it was
    written.
    """
    text, digest = _description(metadata)
    state = dict(MadeTensors(_recipes(tensors, text)))
    _verify(tensors, text, digest)
    return state


def unpacking(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, where: str = "") -> MadeTensors:
    """Return what `unpack` does, each weight made when it is asked for; the digest is verified here. where: begins the
    message of an error.
    """
    with _told(where):
        text, digest = _description(metadata)
        recipes = _recipes(tensors, text)
        _verify(tensors, text, digest)
    return MadeTensors({n: replace(recipe, make=partial(_made, recipe, where)) for n, recipe in recipes.items()})


def _made(recipe: Recipe, where: str) -> Tensor:
    with _told(where):
        return recipe.make()


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Inside the block messages of UserErrors begin with `where`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}{error}") from error.__cause__


def _recipes(tensors: Mapping[str, Tensor], text: str) -> dict[str, Recipe]:
    layouts = _layouts(text)
    parts = {name + kind for name in layouts for kind in (_VALUES, _INDICES, _BITMASK)}
    recipes = recipes_of({name: tensor for name, tensor in tensors.items() if name not in parts})
    for name, layout in layouts.items():
        with _damage(name):
            shape, dtype = tuple(layout["shape"]), tensors[name + _VALUES].dtype
            recipes[name] = Recipe(dtype, shape, partial(_unpacked, tensors, name, layout))
    return recipes


def _unpacked(tensors: Mapping[str, Tensor], name: str, layout: Mapping[str, Any]) -> Tensor:
    with _damage(name):
        decode = {NM: _unpack_groups, Block: _unpack_blocks}.get(type(pattern_of(layout["pattern"])), _unpack_mask)
        kinds = [kind for kind in (_VALUES, _INDICES, _BITMASK) if name + kind in tensors]
        return decode({kind: tensors[name + kind] for kind in kinds}, layout)


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Inside the block a weight is unpacked; what goes wrong there is UserError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the packed weight {name!r} is damaged") from error


def _description(metadata: Mapping[str, str] | None) -> tuple[str, str | None]:
    """Return what a file says of its packed weights, and its digest, which older files lack."""
    metadata = metadata or {}
    text, digest = metadata.get(PACKED, "{}"), metadata.get(DIGEST)
    # A file has both entries; an older one has no others, so that none whose name is damaged is passed over.
    own = metadata.keys() - _FORMAT.keys()
    if (DIGEST in own and PACKED not in own) or (PACKED in own and DIGEST not in own and own != {PACKED}):
        raise UserError("the description of its packed weights is damaged")
    return text, digest


def _layouts(text: str) -> dict[str, Any]:
    try:
        layouts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("the description of its packed weights is damaged") from error
    if not isinstance(layouts, dict):
        raise UserError("the description of its packed weights is damaged")
    return layouts


def _verify(tensors: Mapping[str, Tensor], text: str, digest: str | None) -> None:
    if digest is not None and digest != tensors_digest(dict(sorted(tensors.items())), text):
        raise UserError("its tensors do not match the digest that was written with them: it is damaged")


@dataclass(frozen=True)
class _Layout:
    """One way to store a weight: values of this shape, and so many bits that say where they belong, under `kind`."""

    shape: tuple[int, ...]
    bits: int
    kind: str
    entry: dict[str, Any]


def _smallest(tensor: Tensor) -> _Layout | None:
    """Return the layout that takes the fewest bits; None where that is the dense one."""
    width, used = 8 * tensor.element_size(), tensor != 0
    kept = int(used.count_nonzero())
    found: list[_Layout] = []  # the first of equal ones is taken
    for dim in (1, 0) if tensor.ndim == 2 and kept < tensor.numel() else ():
        for pattern in patterns_of([used if dim else used.t()]):
            shape = (tensor.numel() // pattern.m, pattern.n)
            found.append(
                _Layout(shape, math.prod(shape) * _bits(pattern), _INDICES, {"pattern": str(pattern), "dim": dim})
            )
    found.append(_Layout((kept,), tensor.numel(), _BITMASK, {"pattern": None}))
    for block in BLOCKS if tensor.ndim == 2 and kept < tensor.numel() else ():
        if block.fits(tensor.shape):
            taken = int(_blocks(used, block).any(dim=3).any(dim=2).count_nonzero())
            places = tensor.numel() // block.numel
            found.append(_Layout((taken * block.numel,), places, _BITMASK, {"pattern": str(block)}))
    sizes = [math.prod(layout.shape) * width + layout.bits for layout in found]
    return found[sizes.index(min(sizes))] if min(sizes) < tensor.numel() * width else None


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
    parts = _blocks(tensor, block)
    kept = parts.count_nonzero((2, 3)) > 0
    return {_VALUES: (parts[kept] + 0.0).reshape(-1), _BITMASK: to_bytes(kept.numpy())}  # -0 + 0 is +0


def _blocks(tensor: Tensor, block: Block) -> Tensor:
    """Return the blocks of a matrix, a view (out / R, in / C, R, C)."""
    return tensor.unflatten(1, (-1, block.columns)).unflatten(0, (-1, block.rows)).movedim(1, 2)


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
    values, indices = [], []
    for some in groups.split(_GROUPS):
        # Those that are not zero first; where they are fewer than N, zeros fill up.
        places = (some == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : pattern.n].sort(dim=1).values
        values.append(some.gather(1, places) + 0.0)  # -0 + 0 is +0
        binary = places.reshape(-1, 1).numpy().astype(np.uint8) >> np.arange(_bits(pattern), dtype=np.uint8) & 1
        indices.append(to_bytes(binary))
    return {_VALUES: torch.cat(values), _INDICES: torch.cat(indices)}


def _unpack_groups(parts: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Tensor:
    pattern, shape = _pattern(layout), layout["shape"]
    values, bits = parts[_VALUES], _bits(pattern)
    if values.numel() * pattern.m != math.prod(shape) * pattern.n:
        raise UserError("there are more or fewer values than the shape says")
    binary = to_bits(parts[_INDICES], values.numel() * bits).reshape(-1, pattern.n, bits)
    result = values.new_zeros(len(binary), pattern.m)
    given = values.view(-1, pattern.n).split(_GROUPS)
    for some, own, bits_of in zip(
        result.split(_GROUPS), given, np.split(binary, range(_GROUPS, len(binary), _GROUPS)), strict=True
    ):
        places = torch.from_numpy((bits_of.astype(np.int64) << np.arange(bits)).sum(axis=2))  # (groups, N)
        if not (places.diff(dim=1) > 0).all():
            raise UserError("two values have one place")
        some.scatter_(1, places, own)
    return result.view(shape) if layout["dim"] else result.view(shape[::-1]).t().contiguous()
