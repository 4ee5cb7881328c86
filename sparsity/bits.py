"""Bits in bytes, from the lowest on, as mask files and packed weights store them; and digests of tensors."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sparsity.errors import UserError


def to_bytes(binary: np.ndarray) -> Tensor:
    """Zeros and ones of any shape, row by row -> uint8 (ceil(n / 8),)."""
    return torch.from_numpy(np.packbits(binary.reshape(-1), bitorder="little"))


def to_bits(packed: Tensor, count: int) -> np.ndarray:
    """The first `count` bits, (count,) uint8. UserError unless there are so many, and only zeros fill the last byte."""
    if packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise UserError("there are more or fewer bits than the shape says")
    if count % 8 and int(packed.reshape(-1)[-1]) >> count % 8:
        raise UserError("there are more bits than the shape says")
    return np.unpackbits(packed.numpy(), count=count, bitorder="little")


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over `text`, and the names, shapes, types and bytes of tensors in their order."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
