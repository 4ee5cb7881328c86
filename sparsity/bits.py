"""Bits in bytes, from the lowest on, as mask files and packed weights store them; and digests of tensors."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import UserError

_SET_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # of each byte


@dataclass(frozen=True)
class Bits:
    """A bool tensor on the CPU, held as one bit an element: row by row in uint8 (ceil(n / 8),), padded with zeros."""

    packed: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, binary: Tensor) -> "Bits":
        """Pack a bool tensor of any shape and device."""
        return cls(to_bytes(binary.cpu().contiguous().numpy()), tuple(binary.shape))

    @classmethod
    def read(cls, packed: Tensor, shape: Sequence[int]) -> "Bits":
        """Take bytes from a file. UserError unless they have as many bits as the shape says, and zeros behind them."""
        _check(packed, math.prod(shape))
        return cls(packed.reshape(-1).clone(), tuple(shape))  # a mapped file may change

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def count(self) -> int:
        """Return how many elements are True."""
        return int(_SET_BITS[self.packed.numpy()].sum(dtype=np.int64))

    def tensor(self) -> Tensor:
        """Return the bool tensor, in memory of its own."""
        return torch.from_numpy(to_bits(self.packed, self.numel)).view(torch.bool).reshape(self.shape)


class ShapedTensors(Mapping[str, Tensor]):
    """Base of mappings from names to tensors that are not all held: each is made when it is asked for."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without making it."""


@dataclass(frozen=True)
class Recipe:
    """Hold how a tensor of this type and shape is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class MadeTensors(ShapedTensors):
    """Tensors that are made anew whenever one is asked for; none of them is held. recipes: name -> how it is made."""

    def __init__(self, recipes: Mapping[str, Recipe]):
        self.recipes = dict(recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.recipes[name].shape

    def __getitem__(self, name: str) -> Tensor:
        return self.recipes[name].make()

    def __contains__(self, name: object) -> bool:
        return name in self.recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)


def recipes_of(tensors: Mapping[str, Tensor]) -> dict[str, Recipe]:
    """Return how each of these tensors is made; one that is held is what it is."""
    if isinstance(tensors, MadeTensors):
        return tensors.recipes
    return {name: Recipe(t.dtype, tuple(t.shape), partial(tensors.__getitem__, name)) for name, t in tensors.items()}


def shape_in(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of one of these tensors, without making it where it is not held."""
    return tensors.shape(name) if isinstance(tensors, ShapedTensors) else tuple(tensors[name].shape)


def to_bytes(binary: np.ndarray) -> Tensor:
    """Zeros and ones of any shape, row by row -> uint8 (ceil(n / 8),)."""
    return torch.from_numpy(np.packbits(binary.reshape(-1), bitorder="little"))


def to_bits(packed: Tensor, count: int) -> np.ndarray:
    """The first `count` bits, (count,) uint8. UserError unless there are so many, and only zeros fill the last byte."""
    _check(packed, count)
    return np.unpackbits(packed.numpy(), count=count, bitorder="little")


def _check(packed: Tensor, count: int) -> None:
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise UserError("there are more or fewer bits than the shape says")
    if count % 8 and int(packed.reshape(-1)[-1]) >> count % 8:
        raise UserError("there are more bits than the shape says")


class TensorsDigest:
    """`tensors_digest` of tensors that come one after the other."""

    def __init__(self, text: str = ""):
        self._sha = hashlib.sha256(text.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Add the tensor that comes next."""
        self._sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        self._sha.update(raw(tensor))

    def hexadecimal(self) -> str:
        """Return the digest of those so far, 64 digits."""
        return self._sha.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over `text`, and the names, shapes, types and bytes of tensors in their order."""
    digest = TensorsDigest(text)
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    return digest.hexadecimal()


def is_binary(value: Tensor) -> bool:
    """Return whether all are 0 or 1; a damaged bool holds other bytes, too, and no sparse or meta tensor is ours."""
    if value.layout != torch.strided or value.is_meta:
        return False
    value = value.contiguous().view(torch.uint8) if value.dtype == torch.bool else value
    return bool(((value == 0) | (value == 1)).all())
