"""`--recipe FILE` on a command line: the options of the file take its place, before those that are typed.

So a recipe is a command line in a file, with the same checks and messages, but for the line that they name.
"""

import argparse
import difflib
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.recipes import llm_compressor, sparseml
from engine.recipes.modifiers import Asked, prune_options, training_options
from engine.recipes.own import NAME, is_own, read_stages, save_stage
from engine.recipes.reading import Document, Option, read_document
from sparsity.allocation.budget import as_written
from sparsity.errors import UserError

log = logging.getLogger(__name__)

RECIPE = "--recipe"
RECIPES = (
    "options from a file, before those that are typed: recipe.yaml of a result, a SparseML or llm-compressor recipe"
)


@dataclass(frozen=True)
class Recipe:
    """A script with the options that it was given. options: long name -> text, None for one without a value."""

    script: str
    options: Mapping[str, str | None] = field(default_factory=dict)

    def save(self, folder: Path, mask: Path | None = None, without: Collection[str] = ()) -> None:
        """Write it as a recipe that repeats the run, below the other stages of that of its mask. without: options that
        are no part of it.
        """
        options = {name: value for name, value in self.options.items() if name not in without}
        save_stage(folder / NAME, self.script, options, mask and mask.parent / NAME)

    def __str__(self) -> str:
        return NAME


def expanded(parser: argparse.ArgumentParser, script: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the options of a recipe, where they name one, in front.

    Raises UserError, with file and line, for an option that the script does not have, or a value that it does not take.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(RECIPE)
    finder.add_argument("--epochs")
    try:
        found, _ = finder.parse_known_args(list(arguments))
    except argparse.ArgumentError:
        return list(arguments)  # one without a value: the parser itself says so
    if found.recipe is None:
        return list(arguments)
    options = recipe_options(found.recipe, script, found.epochs)
    if "--epochs" not in parser._option_string_actions:
        for option in (option for option in options if option.name == "epochs"):
            log.info("%s: its %s epochs are the whole run, of as many as are configured", option.where, option.text)
        options = [option for option in options if option.name != "epochs"]
    return [*(part for option in options for part in _argument(parser, script, option)), *arguments]


def recipe_options(named: str, script: str, epochs: str | None = None) -> list[Option]:
    """Return what a recipe, FILE or FILE:STAGE, has for a script. epochs: of its run, where they are typed."""
    path, stage = Path(named), None
    if not os.path.isfile(path) and ":" in named:
        head, _, stage = named.rpartition(":")
        path = Path(head)
    document = read_document(path)
    if is_own(document):
        return _own(document, stage, script)
    asked = (sparseml if sparseml.is_recipe(document) else llm_compressor).read(document, stage)
    return (prune_options if script == "prune" else training_options)(
        asked, Asked(str(path), script, as_written(epochs) if epochs else None)
    )


def _own(document: Document, stage: str | None, script: str) -> list[Option]:
    """Return the options of the one stage that is the script's, or that is named."""
    stages = read_stages(document)
    fit = [name for name, (of, _) in stages.items() if of == script]
    if stage is not None:
        if stage not in stages:
            raise UserError(f"{document.path}: there is no stage {stage!r}; there are: {', '.join(stages)}")
        if stage not in fit:
            raise UserError(f"{document.path}: stage {stage} is for {stages[stage][0]}.py, not {script}.py")
    elif len(fit) != 1:
        if not fit:
            raise UserError(f"{document.path}: there is no stage of {script}.py; there are: {', '.join(stages)}")
        raise UserError(f"{document.path}: stages {', '.join(fit)}: say which, {RECIPE} {document.path}:{fit[-1]}")
    return stages[stage or fit[0]][1]


def _argument(parser: argparse.ArgumentParser, script: str, option: Option) -> list[str]:
    """Return an option as it is typed. UserError where it would be refused."""
    known = parser._option_string_actions
    action = known.get(f"--{option.name}")
    if action is None or option.name in ("help", "recipe"):
        names = [name.removeprefix("--") for name in known if name.startswith("--")]
        near = difflib.get_close_matches(option.name, names, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{option.where}: {script}.py has no option {option.name!r:.60}{hint}")
    if (action.nargs == 0) != (option.text is None):
        expected = "true or false" if action.nargs == 0 else "a value"
        raise UserError(f"{option.where}: {option.name}: expected {expected}")
    if option.text is None:
        return [f"--{option.name}"]
    parts = [option.text] if action.nargs is None else re.split(r"[,\s]+", option.text.strip())
    if isinstance(action.nargs, int) and len(parts) != action.nargs:
        raise UserError(f"{option.where}: {option.name}: expected {action.nargs} values, got {len(parts)}")
    try:
        parser._get_values(action, list(parts))
    except argparse.ArgumentError as error:
        raise UserError(f"{option.where}: {option.name}: {error.message}") from None
    return [f"--{option.name}={parts[0]}"] if action.nargs is None else [f"--{option.name}", *parts]
