"""Translation of modifiers of other tools into the words of this project, and into the options that say the same."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from engine.recipes.reading import Option
from sparsity.errors import UserError

log = logging.getLogger(__name__)
ONESHOT, TRAIN = "oneshot", "train"


@dataclass(frozen=True)
class Schedule:
    """When a magnitude modifier prunes. begin, end: in epochs, of `epochs`; None where a recipe does not say it. first:
    the sparsity at `begin`.
    """

    begin: Fraction
    end: Fraction | None
    first: Fraction
    epochs: Fraction | None = None


@dataclass(frozen=True)
class Pruning:
    """A modifier that prunes.

    where: file:line. run: ONESHOT or TRAIN where its stage says so. sparsity: None with N:M. layers, others: names or
    "re:" patterns of what is pruned (none: all) and kept dense. schedule: None for what prunes in one shot only.
    """

    where: str
    name: str
    pruner: str
    run: str | None = None
    sparsity: str | None = None
    pattern: str | None = None
    layers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    damp: str | None = None
    offload: bool = False
    calibration_mode: str | None = None
    allocation: str | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Held:
    """A modifier that holds the zeros that are there, while the model trains."""

    where: str
    name: str
    run: str | None = None


Modifier = Pruning | Held


@dataclass(frozen=True)
class Asked:
    """Who asks: a file and a script. epochs: of its run, where they are typed."""

    path: str
    script: str
    epochs: Fraction | None = None


def prune_options(modifiers: Sequence[Modifier], asked: Asked) -> list[Option]:
    """Return the options of prune.py. Modifiers that ask for the same in different layers are put together. UserError
    for none, and for several that cannot be one run.
    """
    found = [each for each in modifiers if isinstance(each, Pruning) and each.run != TRAIN]
    for each in modifiers:
        if each not in found:
            log.info("%s: %s is for a script that trains", each.where, each.name)
    if not found:
        raise UserError(f"{asked.path}: nothing in it is for prune.py: no modifier that prunes in one shot")
    first, *more = found
    for each in more:
        if _but_layers(each) != _but_layers(first) or not (each.layers and first.layers):
            raise UserError(
                f"{each.where}: {each.name} asks for something else than {first.name} at {first.where}: one run of"
                f" prune.py does one; name a stage, --recipe {asked.path}:STAGE, or make two recipes of it"
            )
    if first.schedule:
        log.info("%s: in one shot, its schedule is for scripts that train", first.where)
    layers = tuple(dict.fromkeys(layer for each in found for layer in each.layers))
    return _options(replace(first, layers=layers))


def _but_layers(pruning: Pruning) -> Pruning:
    return replace(pruning, layers=(), where="", schedule=None)


def _options(pruning: Pruning) -> list[Option]:
    """Return the options of prune.py for one modifier."""
    values = {
        "pruner": pruning.pruner,
        "enable_update": pruning.pruner == "sparsegpt",
        "pattern": pruning.pattern,
        "sparsities": pruning.sparsity,
        "include": ",".join(pruning.layers),
        "exclude": ",".join(pruning.others),
    }
    values |= {name: getattr(pruning, name) for name in ("damp", "offload", "calibration_mode", "allocation")}
    return [Option(k, None if v is True else v, pruning.where) for k, v in values.items() if v not in (None, False, "")]


def training_options(modifiers: Sequence[Modifier], asked: Asked) -> list[Option]:
    """Return the options of a script that fine-tunes: those of --gradual. A mask that is held is --mask, which the
    command line gives. UserError for what cannot be.
    """
    gradual = [each for each in modifiers if isinstance(each, Pruning) and each.schedule and each.run != ONESHOT]
    held = [each for each in modifiers if isinstance(each, Held) and each.run != ONESHOT]
    for each in modifiers:
        if each not in (*gradual, *held):
            log.info("%s: %s is for prune.py", each.where, each.name)
    if not (gradual or held):
        raise UserError(f"{asked.path}: nothing in it is for {asked.script}.py: no modifier that trains")
    if len(gradual) > 1:
        raise UserError(f"{gradual[1].where}: {gradual[1].name}: a run prunes to one sparsity; one modifier at most")
    for each in held:
        log.info("%s: %s: the mask of --mask is held in any case, to the end", each.where, each.name)
    return _gradual(gradual[0], asked.epochs) if gradual else []


def _gradual(pruning: Pruning, typed: Fraction | None) -> list[Option]:
    """Return the options of --gradual for one modifier. typed: the epochs of the run, where the recipe has none."""
    schedule, where = pruning.schedule, pruning.where
    assert schedule is not None, "modifiers without a schedule are for prune.py"
    if pruning.layers or pruning.others:
        raise UserError(f"{where}: {pruning.name}: --gradual prunes all layers that the mask of the model would have")
    if schedule.first:
        begin = f"prune.py -s {float(100 * schedule.first):g}"
        raise UserError(
            f"{where}: {pruning.name}: pruning begins with what --mask has: {begin} makes one; write 0 here"
        )
    if pruning.pattern:
        raise UserError(f"{where}: {pruning.name}: --gradual prunes single weights, not {pruning.pattern}")
    epochs = schedule.epochs or typed
    if schedule.end is None:
        raise UserError(f"{where}: {pruning.name} does not say in which epoch pruning ends: add its end")
    if not epochs:
        raise UserError(f"{where}: {pruning.name}: of how many epochs? Give --epochs, or an EpochRangeModifier")
    if not 0 <= schedule.begin <= schedule.end <= epochs:
        raise UserError(f"{where}: {pruning.name}: it must begin before it ends, within {float(epochs):g} epochs")
    values = {
        "gradual": pruning.sparsity,
        "gradual_score": "omp" if pruning.pruner == "omp" else "localmp",
        "prune_from": f"{float(schedule.begin / epochs):.12g}",
        "prune_until": f"{float(schedule.end / epochs):.12g}",
    }
    values |= {"epochs": f"{float(epochs):.12g}"} if schedule.epochs else {}
    return [Option(name, text, where) for name, text in values.items()]
