"""What is pruned: the models, their losses and checkpoint names, and the tokenizer. Import the submodules by name."""

import difflib
import importlib
from types import ModuleType

NAMES = ("xvlm",)


def check(name: str) -> None:
    """ValueError, with the nearest name, unless there is a model of this name."""
    if name not in NAMES:
        (nearest,) = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
        raise ValueError(f"there is no model {name!r}, did you mean {nearest!r}? There are: {', '.join(NAMES)}")


def find(name: str) -> ModuleType:
    """Module of a model, with `Config`, `build(config, weights)` and `prunable_view(model)`; ValueError as `check`."""
    check(name)
    return importlib.import_module(f"models.{name}")
