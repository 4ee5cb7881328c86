"""Bits in bytes, from the lowest on, as mask files and packed weights store them."""

import numpy as np
import torch
from torch import Tensor


def to_bytes(binary: np.ndarray) -> Tensor:
    """Zeros and ones of any shape, row by row -> uint8 (ceil(n / 8),)."""
    return torch.from_numpy(np.packbits(binary.reshape(-1), bitorder="little"))


def to_bits(packed: Tensor, count: int) -> np.ndarray:
    """The first `count` bits, (count,) uint8."""
    return np.unpackbits(packed.numpy(), count=count, bitorder="little")
