"""Any model of timm, of transformers, or any nn.Module. `build` and `prunable_view` load on first use."""

import importlib
from typing import Any

__all__ = ["build", "prunable_view"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'models.external' has no attribute {name!r}")
    return getattr(importlib.import_module("models.external.model"), name)
