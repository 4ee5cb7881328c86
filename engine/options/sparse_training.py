"""The options of sparse training, in every script that fine-tunes: pruned step by step, taught by the dense model, by
low-rank adapters. Needs no torch.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sparsity.allocation.budget import as_written, parse_sparsities
from sparsity.errors import MissingFileError, UserError
from sparsity.pattern import NM, parse_pattern

SCORES = {"omp": "global", "localmp": "layer"}  # pruners by magnitude -> the allocation that each is known for
FROM, UNTIL = 0.0, 0.7
OF_GRADUAL = {  # option -> what it is where it is not given
    "gradual_score": "omp",
    "prune_from": FROM,
    "prune_until": UNTIL,
    "prune_every": None,
    "regrow": False,
}


@dataclass(frozen=True)
class GradualOptions:
    """How weights are pruned while a model trains.

    target: the fraction that is pruned at the end, or a pattern. score: of `SCORES`. start, until: fractions of the run
    between which it is pruned. every: steps between two masks; None: so many that there are at most
    `engine.sparse_training.schedule.MASKS`. regrow: pruned weights go on learning and may return, until the last mask.
    """

    target: Decimal | NM
    score: str = "omp"
    start: float = FROM
    until: float = UNTIL
    every: int | None = None
    regrow: bool = False

    @property
    def label(self) -> str:
        """Return the target as a part of the name of a folder: in per cent, or N and M."""
        return f"{self.target.n}of{self.target.m}" if isinstance(self.target, NM) else f"{float(100 * self.target):g}"


@dataclass(frozen=True)
class SparseOptions:
    """The kinds of sparse training that are asked for. distill: the weight of the match to the teacher, (0, 1].
    teacher: a file of its weights; None: those that the run starts from. lora: the rank of the adapters.
    """

    gradual: GradualOptions | None = None
    distill: float | None = None
    teacher: Path | None = None
    lora: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Return what the result depends on, as plain values; empty where nothing is asked for."""
        gradual = self.gradual and vars(self.gradual) | {"target": str(self.gradual.target)}
        values = vars(self) | {"gradual": gradual, "teacher": self.teacher and str(self.teacher)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def name(self) -> str:
        """Return what is asked for as a part of the name of a folder: "" where that is nothing."""
        gradual = self.gradual and f"gradual{self.gradual.label}{'_regrow' if self.gradual.regrow else ''}"
        parts = [gradual, self.distill and f"distill{self.distill:g}", self.lora and f"lora{self.lora}"]
        return "_".join(part for part in parts if part)


def add_sparse_options(
    parser: argparse.ArgumentParser, positive_int: Callable[[str], int], share: Callable[[str], float]
) -> None:
    """Add the options of `SparseOptions`. positive_int, share: argparse types."""
    add = parser.add_argument_group("sparse training, freely combined").add_argument
    what = "prune by magnitude while training: to a sparsity in per cent, or a pattern N:M; from --dense or --mask"
    add("--gradual", type=_target, metavar="SPARSITY", help=f"{what} (default: no)")
    scores = "omp: over all weights, or localmp: within each layer (default: omp)"
    add("--gradual_score", choices=tuple(SCORES), help=f"of --gradual: {scores}")
    add("--prune_from", type=share, help=f"of --gradual: share of the run before it (default: {FROM})")
    add("--prune_until", type=share, help=f"of --gradual: after this share the mask stays (default: {UNTIL})")
    add(
        "--prune_every", type=positive_int, metavar="STEPS", help="of --gradual: steps between masks; default: 20 masks"
    )
    returns = "pruned weights go on learning, and may return until the last mask"
    add("--regrow", action="store_true", help=f"of --gradual: {returns} (default: no)")
    match = "share W of the loss is the match to the dense model's outputs, that of prune.py --recover; 1: no labels"
    add("--distill", type=_weight, metavar="W", help=f"{match} (default: no)")
    teacher = "model.safetensors or best.pt of a run of the same task; default: the weights that the run starts from"
    add("--teacher", type=Path, metavar="FILE", help=f"of --distill: {teacher}")
    rank = "train adapters of this rank in place of the weights, merged in at the end; zeros stay"
    add("--lora", type=positive_int, metavar="R", help=f"{rank} (default: no)")


def _target(text: str) -> str:
    """argparse type: what `target_of` reads."""
    try:
        target_of(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def target_of(text: str) -> Decimal | NM:
    """Return one sparsity, written in per cent or as a fraction, or N:M. UserError for anything else."""
    if ":" in text and (pattern := parse_pattern(text)):
        return pattern
    first, *more = parse_sparsities(text)
    if more:
        raise UserError(f"expected one sparsity, got {text!r}")
    return first


def _weight(text: str) -> float:
    """argparse type: a number above 0, at most 1."""
    exact = as_written(text)
    if exact is None or not 0 < exact <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, got {text!r}")
    return float(exact)


def sparse_options(args: argparse.Namespace) -> SparseOptions:
    """Return what the options of `add_sparse_options` say. UserError for what cannot be in one line."""
    unset = [name for name in OF_GRADUAL if getattr(args, name) not in (None, False)]
    if args.gradual is None and unset:
        raise UserError(f"--{unset[0]} is for --gradual SPARSITY: give that, or leave it out")
    if args.teacher is not None and args.distill is None:
        raise UserError("--teacher is for --distill W: give that, or leave it out")
    if args.regrow and args.lora is not None:
        raise UserError("--lora trains no single weight that could return: leave out --regrow, or --lora")
    gradual = None
    if args.gradual is not None:
        given = ((getattr(args, name), default) for name, default in OF_GRADUAL.items())
        score, start, until, every, regrow = (default if value is None else value for value, default in given)
        if start > until:
            raise UserError(f"--prune_from {start:g} is after --prune_until {until:g}: pruning begins before it ends")
        gradual = GradualOptions(target_of(args.gradual), score, start, until, every, regrow)
    return SparseOptions(gradual, args.distill, args.teacher, args.lora)


def check_sparse_training(args: argparse.Namespace) -> None:
    """Raise UserError for what `sparse_options` refuses, and for what cannot go with the other options of a script that
    fine-tunes. args: with the mask and the snapshot of the run.
    """
    options = sparse_options(args)
    if not options.given:
        return
    if options.teacher and not options.teacher.is_file():
        raise MissingFileError(f"--teacher {options.teacher}: there is no such file")
    if args.evaluate and not args.snapshot.is_file():
        option = next(iter(options.given))
        raise UserError(f"--evaluate trains nothing, and no run with --{option} is there to evaluate: {args.snapshot}")
