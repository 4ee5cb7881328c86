"""Packed weights, and what share of the dense bytes they take."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from engine.export import save_packed
from sparsity.packing import Packed


def write_packed(state: Mapping[str, Tensor], path: Path, prunable: Iterable[str] | None = None) -> str:
    """Write a packed file, and return what it takes: of the prunable weights, and of the whole.

    state: held or made one at a time, see `sparsity.packing.Packed`. prunable: keys of the weights that are pruned;
    default: those that take less without their zeros.
    """
    packed = Packed(state)
    save_packed(packed, path)
    kind, names = "weights with zeros", list(packed.layouts)
    if prunable is not None:
        kind, names = "prunable weights", [name for name in dict.fromkeys(prunable) if name in packed.dense]
    size, dense = path.stat().st_size, sum(packed.dense.values())
    own = sum(packed.dense[name] for name in names)
    share = f"{packed.bytes(names) / own:.3f} of the {own / 1e6:.2f} MB of the {kind}, " if own else ""
    return f"{size / 1e6:.2f} MB; {share}{size / dense:.3f} of the {dense / 1e6:.2f} MB of all"
