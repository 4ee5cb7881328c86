"""Recipes of SparseML for training: lists of `- !GMPruningModifier` and the like, in YAML or in a Markdown file."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import yaml

from engine.recipes.modifiers import Held, Modifier, Pruning, Schedule
from engine.recipes.names import selected
from engine.recipes.reading import Arguments, Document
from sparsity.errors import UserError

PRUNERS = {"GMPruningModifier": "magnitude", "MagnitudePruningModifier": "magnitude"}
PRUNERS |= {"GlobalMagnitudePruningModifier": "omp"}
EPOCHS, CONSTANT = "EpochRangeModifier", "ConstantPruningModifier"
MASKS = "how often masks are made is --prune_every STEPS, in steps; by default there are 20"


def is_recipe(document: Document) -> bool:
    """Return whether a file has a list with a tagged modifier."""
    return any(item.tag.startswith("!") for _, item in _items(document))


def _items(document: Document) -> Iterator[tuple[str, yaml.Node]]:
    """Return (name of the list, item) for each item of each list."""
    if isinstance(document.root, yaml.MappingNode):
        for key, value in document.root.value:
            if isinstance(value, yaml.SequenceNode):
                yield from ((key.value, item) for item in value.value)


def read(document: Document, stage: str | None) -> list[Modifier]:
    """Return the modifiers that prune. UserError, with the line, for any other, and for an argument that is not
    understood. stage: there are none here.
    """
    if stage is not None:
        raise UserError(f"{document.path}: there is no stage {stage!r:.60}: this form of recipe has none")
    for key, _, value in document.entries(document.root, "lists of modifiers"):
        if isinstance(value, yaml.MappingNode):
            raise document.refuse(key, f"{key.value:.60}: expected a value, or a list of modifiers")
    found: list[Modifier] = []
    epochs: Fraction | None = None
    for _, item in _items(document):
        name = item.tag.removeprefix("!")
        arguments = Arguments(document, name, item)
        if name == EPOCHS:
            epochs = _epochs(arguments)
        elif name in READERS:
            found.append(READERS[name](arguments))
        else:
            known = ", ".join((*READERS, EPOCHS))
            raise document.refuse(item, f"{name:.60} is no modifier that prunes ({known}): take it out of the recipe")
        arguments.end()
    return [_during(each, epochs) for each in found]


def _epochs(arguments: Arguments) -> Fraction:
    arguments.only("start_epoch", ("0", "0.0"), "a run begins with epoch 0")
    return arguments.document.number(arguments.need("end_epoch"))


def _during(modifier: Modifier, epochs: Fraction | None) -> Modifier:
    """Return the modifier in a run of so many epochs."""
    if isinstance(modifier, Held) or modifier.schedule is None:
        return modifier
    return replace(modifier, schedule=replace(modifier.schedule, epochs=epochs))


def _magnitude(arguments: Arguments) -> Pruning:
    document, name = arguments.document, arguments.name
    first = arguments.need("init_sparsity")
    begun = Fraction(0) if getattr(first, "value", "") == "__FROM_PARAM__" else document.number(first)
    sparsity = arguments.share("final_sparsity")
    layers = selected(document, arguments.need("params"))
    begin, end = (document.number(arguments.need(key)) for key in ("start_epoch", "end_epoch"))
    arguments.only("leave_enabled", ("true",), "masks are held to the end: true")
    arguments.only("inter_func", ("cubic",), "sparsity rises as a cubic: cubic")
    arguments.only("mask_type", ("unstructured",), "unstructured here; N:M is --pattern")
    arguments.only("log_types", ("__all__",), "loggers are --wandb and --tensorboard: leave it out")
    arguments.only("phased", ("false",), "masks are never lifted: false")
    arguments.note("update_frequency", MASKS)
    overall = arguments.take("global_sparsity")
    pruner = "omp" if overall is not None and document.flag(overall) else PRUNERS[name]
    return Pruning(
        document.where(arguments.node), name, pruner, sparsity=sparsity, layers=layers,
        schedule=Schedule(begin, end, begun),
    )  # fmt: skip


def _constant(arguments: Arguments) -> Held:
    told = "a mask is held from the beginning to the end, wherever it has zeros"
    for key in ("params", "start_epoch", "end_epoch", "update_frequency"):
        arguments.note(key, told)
    return Held(arguments.document.where(arguments.node), arguments.name)


READERS: Mapping[str, Callable[[Arguments], Modifier]] = {name: _magnitude for name in PRUNERS} | {CONSTANT: _constant}
