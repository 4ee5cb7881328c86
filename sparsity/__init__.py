"""Masks and how they are made: prunable views, masks, patterns, statistics, allocation and selection.

The names below load on first use, so that arguments can be parsed (`sparsity.allocation.budget`, `sparsity.pattern`)
before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsity import maskllm, utils
    from sparsity.allocation.budget import budget, parse_sparsities
    from sparsity.masks import Masks
    from sparsity.pattern import parse_pattern
    from sparsity.statistics.inputs import Statistics
    from sparsity.view import PrunableView, PrunableWeight

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

__all__ = [
    "Masks",
    "PrunableView",
    "PrunableWeight",
    "Statistics",
    "budget",
    "maskllm",
    "parse_pattern",
    "parse_sparsities",
    "utils",
]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"sparsity.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsity' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sparsity.{_HOMES[name]}"), name)
