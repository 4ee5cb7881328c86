"""Packed weights, and what share of the dense bytes they take."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.export import save_state
from sparsity.casting import cast
from sparsity.packing import pack


def save_packed(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None, prunable: Iterable[str]) -> str:
    """Write a packed file, and return what it takes: of the prunable weights, and of the whole.

    dtype: of floating-point weights; None: as they are. prunable: keys of the weights that are pruned.
    """
    state = cast(state, dtype, allowed=("vanished",)) if dtype else dict(state)
    save_state(state, path, packed=True)
    chosen = {name: state[name].cpu() for name in dict.fromkeys(prunable) if name in state}
    tensors, _ = pack(chosen)
    shares = (_bytes(tensors) / _bytes(chosen), path.stat().st_size / _bytes(state))
    return f"{path.stat().st_size / 1e6:.2f} MB; {shares[0]:.3f} of the prunable weights, {shares[1]:.3f} of all"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
