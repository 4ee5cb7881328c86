"""An axis of a plan: a folder of small files, whose names are the names on the command line."""

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.errors import UserError


@dataclass(frozen=True)
class Registry:
    """The choices of an axis. Listing them imports none; looking one up imports that file alone.

    kind: what a choice is called in messages. package: the folder with a file for each choice, each of which defines
    exactly one subclass of `base`, a class given as "module:Name". others: files of the folder that are no choices.
    """

    kind: str
    package: str
    base: str
    others: Sequence[str] = ("base",)

    def names(self) -> list[str]:
        """Return the names of all choices, sorted."""
        spec = importlib.util.find_spec(self.package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        files = {path.stem for folder in folders for path in Path(folder).glob("*.py")}
        return sorted(files - {"__init__", *self.others})

    def check(self, name: str, others: Iterable[str] = ()) -> None:
        """Raise UserError, with the nearest name, unless there is a choice of this name, or it is one of the others."""
        names = [*self.names(), *others]
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise UserError(
                f"there is no {self.kind} {name!r}, did you mean {nearest[0]!r}? There are: {', '.join(names)}"
            )

    def find(self, name: str) -> Any:
        """Return the class of a choice. UserError where there is none of this name, or its file has not exactly one."""
        self.check(name)
        home, _, base_name = self.base.partition(":")
        base = getattr(importlib.import_module(home), base_name)
        module = importlib.import_module(f"{self.package}.{name}")
        kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base)]
        kinds = [kind for kind in kinds if kind.__module__ == module.__name__]
        if len(kinds) != 1:
            found = f"it has {', '.join(kind.__name__ for kind in kinds)}" if kinds else "it has none"
            file = f"{self.package.replace('.', '/')}/{name}.py"
            raise UserError(f"{file}: expected one subclass of {self.base.replace(':', '.')}, {found}")
        return kinds[0]


def options_of(made: Any) -> dict[str, Any]:
    """Return the options that a score or a reconstruction was made with: its constructor's parameters."""
    return {name: getattr(made, name) for name in inspect.signature(type(made)).parameters}


def unread(score: Any, option: str, reconstruction: type | None) -> UserError:
    """Return the error for an option that a plan does not read."""
    known = [*inspect.signature(type(score)).parameters]
    known += [*inspect.signature(reconstruction).parameters] if reconstruction else []
    return UserError(f"pruner {score.name!r} has no option {option!r}; it has: {', '.join(known) or 'none of its own'}")
