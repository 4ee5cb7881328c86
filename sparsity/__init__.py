"""What a mask is: prunable views, masks, patterns, statistics, allocation and selection.

The names below load on first use, so that arguments can be parsed (`sparsity.allocation.budget`, `sparsity.pattern`)
before torch is imported.
"""

import importlib

_HOMES = {
    "Masks": "masks",
    "PrunableView": "view",
    "PrunableWeight": "view",
    "Statistics": "statistics.inputs",
    "budget": "allocation.budget",
    "parse_pattern": "pattern",
    "parse_sparsities": "allocation.budget",
}

_MODULES = ("maskllm", "utils")  # of the quick start of learnable masks

__all__ = sorted((*_HOMES, *_MODULES))


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"sparsity.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsity.{_HOMES[name]}"), name)
