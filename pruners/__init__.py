"""Which weights go: one file per method, whose name is its name on the command line.

`available()` lists them and imports none; `build(name)` imports that one alone.
"""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity.errors import UserError

if TYPE_CHECKING:
    from pruners.base import Pruner


_NO_PRUNERS = ("__init__", "base", "layer_wise")  # files of this folder


def available() -> list[str]:
    """The names of the pruners: the files of this folder but for their bases."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NO_PRUNERS)


def build(pruner: "str | type[Pruner]", **options: Any) -> "Pruner":
    """A pruner from its name, or from its class, with its options. UserError for an unknown name (with the nearest
    one) or option.
    """
    kind = _find(pruner) if isinstance(pruner, str) else pruner
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise UserError(f"pruner {kind.name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    return kind(**options)


def options(name: str) -> list[str]:
    """The options that a pruner of this name takes; the command line has options of the same names."""
    return list(inspect.signature(_find(name)).parameters)


def own_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of all options that are given, those that a pruner of this name takes."""
    return {option: given[option] for option in options(name)}


def one_shot(name: str) -> bool:
    """Whether one pass over the data, or none, serves all sparsities."""
    return "epochs" not in options(name) and not _find(name).trains


def check(name: str) -> None:
    """UserError, with the nearest name, unless there is a pruner of this name."""
    names = available()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise UserError(f"there is no pruner {name!r}, did you mean {nearest[0]!r}? There are: {', '.join(names)}")


def _find(name: str) -> "type[Pruner]":
    check(name)
    module = importlib.import_module(f"pruners.{name}")
    base = importlib.import_module("pruners.base").Pruner
    kinds: list[Any] = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base)]
    kinds = [kind for kind in kinds if kind.__module__ == module.__name__]
    if len(kinds) != 1:
        found = f"it has {', '.join(kind.__name__ for kind in kinds)}" if kinds else "it has none"
        raise UserError(f"pruners/{name}.py: expected one subclass of pruners.base.Pruner, {found}")
    return kinds[0]
