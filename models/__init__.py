"""Models that are pruned, their losses and checkpoint names, and the tokenizer. Import the submodules by name."""

import difflib
import importlib
import importlib.util
import re
from types import ModuleType

from sparsity.errors import UserError

KINDS = {"xvlm": "pairs", "blip": "pairs", "dino": "labels", "dit": "noise"}  # name -> the data that a model takes
NAMES = tuple(KINDS)
ANY = "timm:NAME, hf:NAME_OR_FOLDER, package.module:function"  # any other model, of the kind "external"
LIBRARIES = ("timm:", "hf:")  # what the names of models that can be fine-tuned begin with
FOREIGN = "timm:NAME, hf:NAME_OR_FOLDER"
_ANY = re.compile(r"(timm|hf):.+|\w+(\.\w+)*:\w+")


def kind(name: str) -> str:
    """The kind of data that a model takes; UserError, with the nearest name, unless there is a model of this name."""
    if ":" not in name:
        check(name)
        return KINDS[name]
    if not _ANY.fullmatch(name):
        raise UserError(f"there is no model {name!r}; there are {', '.join(NAMES)}, and any other as {ANY}")
    return "external"


def check(name: str) -> None:
    """UserError, with the nearest name, unless there is a model of this name."""
    if name not in NAMES:
        (nearest,) = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
        raise UserError(f"there is no model {name!r}, did you mean {nearest!r}? There are: {', '.join(NAMES)}")


def find(name: str) -> ModuleType:
    """Module of a model, with `Config`, `build(config, weights)` and `prunable_view(model)`; UserError as `kind`. Of
    any other, models.external.model.
    """
    return importlib.import_module(f"models.{'external' if kind(name) == 'external' else name}.model")


def of_task(task: str) -> tuple[str, ...]:
    """The models that there is a task ("retrieval", "captioning", ...) of: a file models/<model>/<task>.py."""
    return tuple(name for name in NAMES if importlib.util.find_spec(f"models.{name}.{task}"))


def foreign_task(task: str) -> bool:
    """Return whether there is a task of models of other libraries: a file models/foreign/<task>.py."""
    return importlib.util.find_spec(f"models.foreign.{task}") is not None


def check_task(name: str, task: str) -> None:
    """Raise UserError unless there is this task of this model."""
    own = kind(name) != "external"
    there = (*of_task(task), *((FOREIGN,) if foreign_task(task) else ()))
    if name not in there and (own or not (foreign_task(task) and name.startswith(LIBRARIES))):
        function = not own and not name.startswith(LIBRARIES)
        way_out = "; a model of a function is pruned, and recovered (prune.py --recover), not fine-tuned" * function
        raise UserError(f"there is no {task} with the model {name!r}; there is with: {', '.join(there)}{way_out}")


def find_task(name: str, task: str) -> ModuleType:
    """Module of a task model, see models/parts/task_model.py; UserError as `check_task`."""
    check_task(name, task)
    return importlib.import_module(f"models.{'foreign' if name.startswith(LIBRARIES) else name}.{task}")
