"""Recipes of llm-compressor, and of SparseML's one-shot scripts: stages of groups of modifiers.

sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", ignore: ["re:.*lm_head"]}
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import yaml

from engine.recipes.modifiers import ONESHOT, TRAIN, Held, Modifier, Pruning, Schedule
from engine.recipes.names import selected
from engine.recipes.reading import Arguments, Document
from sparsity.errors import UserError
from sparsity.pattern import parse_pattern

UNSTRUCTURED = ("0:0", "unstructured")
OWL = {"owl_m": Fraction(5), "owl_lmbda": Fraction("0.08")}  # the values of arXiv 2310.05175, and of --allocation owl
COLUMNS = "128"


@dataclass(frozen=True)
class _Place:
    """Where a modifier stands: its stage, and what that is for where it says so."""

    stage: str
    run: str | None = None


def read(document: Document, stage: str | None) -> list[Modifier]:
    """Return the modifiers of one stage, or of all. UserError, with the line, for what is not understood."""
    found: list[Modifier] = []
    stages = []
    for place, name, key, node in _modifiers(document):
        stages.append(place.stage)
        if stage not in (None, place.stage):
            continue
        if name not in READERS:
            hint = f"; of several stages one can be named, --recipe {document.path}:STAGE" if place.stage else ""
            known = ", ".join(READERS)
            raise document.refuse(key, f"{name:.60} is no modifier that prunes ({known}): take it out{hint}")
        arguments = Arguments(document, name, node)
        modifier = READERS[name](arguments)
        arguments.end()
        found.append(replace(modifier, where=document.where(key), run=place.run))
    if stage is not None and stage not in stages:
        there = ", ".join(dict.fromkeys(filter(None, stages)))
        raise UserError(f"{document.path}: there is no stage {stage!r:.60}; there are: {there or 'none'}")
    return found


def _modifiers(document: Document) -> Iterator[tuple[_Place, str, yaml.Node, yaml.Node]]:
    """Return (where it stands, name, key, arguments) of each modifier of a file."""
    for key, name, value in document.entries(document.root, "stages, or modifiers"):
        if name.endswith("Modifier"):
            yield _Place(""), name, key, value
        elif name.endswith("modifiers"):
            yield from _group(document, _Place(""), value)
        elif isinstance(value, yaml.MappingNode):
            yield from _stage(document, name, value)
        elif not isinstance(value, yaml.ScalarNode):  # a scalar is a variable
            raise document.refuse(key, f"{name:.60}: expected a stage, with modifiers")


def _stage(document: Document, stage: str, node: yaml.Node) -> Iterator[tuple[_Place, str, yaml.Node, yaml.Node]]:
    entries = document.entries(node, f"the modifiers of {stage}")
    runs = [value for _, name, value in entries if name == "run_type"]
    run = document.text(runs[0]) if runs else None
    if run not in (None, ONESHOT, TRAIN):
        raise document.refuse(runs[0], f"run_type: expected {ONESHOT} or {TRAIN}, got {run:.60}")
    for key, name, value in entries:
        if name.endswith("Modifier"):
            yield _Place(stage, run), name, key, value
        elif name.endswith("modifiers"):
            yield from _group(document, _Place(stage, run), value)
        elif name != "run_type":
            raise document.refuse(
                key, f"{name:.60}: neither a modifier nor a group of them; stages of our own are named as their script"
            )


def _group(document: Document, place: _Place, node: yaml.Node) -> Iterator[tuple[_Place, str, yaml.Node, yaml.Node]]:
    for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        for key, name, value in document.entries(each, "modifiers"):
            yield place, name, key, value


def _oneshot(arguments: Arguments, pruner: str) -> Pruning:
    """Return what SparseGPT's and Wanda's modifiers have in common."""
    document = arguments.document
    sparsity, pattern = _amount(arguments)
    targets, ignored, sequential = (arguments.take(key) for key in ("targets", "ignore", "sequential_update"))
    arguments.note("sequential_targets", "blocks are found by themselves")
    dense = sequential is not None and not document.flag(sequential)
    return Pruning(
        document.where(arguments.node), arguments.name, pruner, sparsity=sparsity, pattern=pattern,
        layers=() if targets is None else selected(document, targets),
        others=() if ignored is None or ignored.value == [] else selected(document, ignored),
        calibration_mode="dense" if dense else "sequential", allocation=_profile(arguments, pattern),
    )  # fmt: skip


def _amount(arguments: Arguments) -> tuple[str | None, str | None]:
    """Return sparsity and pattern, one of which is None. N of N:M is there what is pruned, here what is kept."""
    document = arguments.document
    given, structure = arguments.take("sparsity"), arguments.take("mask_structure")
    sparsity = None if given is None else document.number(given)
    text = UNSTRUCTURED[0] if structure is None else document.text(structure)
    if text in UNSTRUCTURED:
        if given is None or not sparsity or not 0 < sparsity < 1:
            raise document.refuse(given or arguments.node, f"{arguments.name}: expected a sparsity between 0 and 1")
        return str(float(sparsity)), None
    try:
        pattern = parse_pattern(text)
    except UserError as error:
        assert structure is not None
        raise document.refuse(structure, f"mask_structure: {error}") from None
    assert pattern is not None
    if given is not None and sparsity != Fraction(pattern.n, pattern.m):
        told = f"sparsity: mask_structure {text} prunes {pattern.n} of {pattern.m}: leave it out, or make them agree"
        raise document.refuse(given, told)
    return None, f"{pattern.m - pattern.n}:{pattern.m}"


def _profile(arguments: Arguments, pattern: str | None) -> str | None:
    """Return the allocation; UserError for one with other values than the paper's."""
    document, node = arguments.document, arguments.take("sparsity_profile")
    for key, value in OWL.items():
        given = arguments.take(key)
        if given is not None and document.number(given) != value:
            raise document.refuse(given, f"{key}: --allocation owl has {float(value):g}")
    if node is None:
        return None
    if document.text(node).lower() != "owl" or pattern:
        raise document.refuse(node, "sparsity_profile: owl, and without an N:M mask_structure")
    return "owl"


def _sparsegpt(arguments: Arguments) -> Pruning:
    document, found = arguments.document, _oneshot(arguments, "sparsegpt")
    damps = [node for key in ("dampening_frac", "percdamp") if (node := arguments.take(key)) is not None]
    arguments.only("block_size", (COLUMNS,), f"SparseGPT goes through {COLUMNS} columns at a time here")
    arguments.only("preserve_sparsity_mask", ("false",), "give --from_mask FILE in its place")
    arguments.only("quantize", ("false",), "nothing is quantised here: false")
    offload = arguments.take("offload_hessians")
    return replace(
        found,
        damp=str(float(document.number(damps[0]))) if damps else None,
        offload=offload is not None and document.flag(offload),
    )


def _wanda(arguments: Arguments) -> Pruning:
    return _oneshot(arguments, "wanda")


def _magnitude(arguments: Arguments) -> Pruning:
    document = arguments.document
    first, sparsity = document.number(arguments.need("init_sparsity")), arguments.share("final_sparsity")
    targets, start, end = (arguments.take(key) for key in ("targets", "start", "end"))
    arguments.only("update_scheduler", ("cubic",), "sparsity rises as a cubic: cubic")
    pattern = _blocks(arguments)
    arguments.only("leave_enabled", ("true",), "masks are held to the end: leave it out")
    arguments.only("apply_globally", ("false",), "that is GlobalMagnitudePruningModifier, or -p omp")
    arguments.note("update", "how often masks are made is --prune_every STEPS, in steps; by default there are 20")
    begins, ends = (None if node is None else document.number(node) for node in (start, end))
    schedule = Schedule(begins or Fraction(0), ends, first)
    return Pruning(
        document.where(arguments.node), arguments.name, "magnitude", sparsity=sparsity,
        pattern=pattern, layers=() if targets is None else selected(document, targets), schedule=schedule,
    )  # fmt: skip


def _blocks(arguments: Arguments) -> str | None:
    """Return the pattern of "block_R,C", whose scores are sums over the block there, too; None where there is none."""
    node = arguments.take("mask_structure")
    text = "unstructured" if node is None else arguments.document.text(node)
    if node is None or text == "unstructured":
        return None
    match = re.fullmatch(r"block_(\d{1,6}),(\d{1,6})", text)
    if match is None:
        raise arguments.document.refuse(node, "mask_structure: unstructured, or block_R,C; N:M is --pattern")
    return f"block{match[1]}x{match[2]}"


def _constant(arguments: Arguments) -> Held:
    for key in ("targets", "start", "end", "update"):
        arguments.note(key, "a mask is held from the beginning to the end, wherever it has zeros")
    return Held(arguments.document.where(arguments.node), arguments.name)


READERS: Mapping[str, Callable[[Arguments], Modifier]] = {
    "SparseGPTModifier": _sparsegpt,
    "WandaPruningModifier": _wanda,
    "MagnitudePruningModifier": _magnitude,
    "ConstantPruningModifier": _constant,
}
