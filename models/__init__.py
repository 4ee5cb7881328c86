"""What is pruned: the models, their losses and checkpoint names, and the tokenizer. Import the submodules by name."""

import difflib
import importlib
from types import ModuleType

NAMES = ("xvlm",)


def find(name: str) -> ModuleType:
    """Module of a model, with `Config`, `build(config)` and `prunable_view(model)`. ValueError suggests the nearest name."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known models: {', '.join(NAMES)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return importlib.import_module(f"models.{name}")
