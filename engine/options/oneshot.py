"""The options of the one-shot pruning scripts; needs no torch, so that they are checked at once."""

import argparse
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from engine.options.command_line import OFFLOAD, positive_int
from sparsity.allocation.budget import parse_sparsities
from sparsity.errors import UserError
from sparsity.pattern import NM, parse_pattern
from sparsity.run.axes import CALIBRATIONS

PRUNERS = {"dense": None, "magnitude": "magnitude", "random": "rand", "wanda": "wanda", "sparsegpt": "sparsegpt"}
PRUNERS |= {"alps": "alps", "admm": "admm", "best": "best", "fast": "fast"}
OF_INPUTS = tuple(name for name in PRUNERS if name not in ("dense", "magnitude", "random"))

USUAL = 2, 4  # N:M where nothing else is asked for


@dataclass(frozen=True)
class Target:
    """The weights that are to be zero: a pattern says it, or a share of the prunable weights, a fraction."""

    pattern: NM | None
    sparsity: Decimal | None = None

    def __str__(self) -> str:
        return str(self.pattern) if self.pattern else f"{self.stem} %"

    @property
    def stem(self) -> str:
        """Return the target as it stands in names of files."""
        return f"{self.pattern.n}of{self.pattern.m}" if self.pattern else f"{float(100 * self.sparsity):.12g}"


def add_oneshot_options(parser: argparse.ArgumentParser, nsamples: int) -> None:
    """`--pruner`, `--N`, `--M`, `--sparsity`, `--nsamples`, `--enable-update`, `--calibration-mode`, `--offload`,
    `--save-model`.

    nsamples: the default.
    """
    add = parser.add_argument_group("pruning").add_argument
    add("--pruner", default="sparsegpt", choices=PRUNERS, help="default: %(default)s")
    add("--N", type=positive_int, help=f"weights kept of every M (default: {USUAL[0]})")
    add("--M", type=positive_int, help=f"consecutive weights of a row (default: {USUAL[1]})")
    add("--sparsity", help="per cent of the weights that are pruned, anywhere, instead of N:M (default: N:M)")
    add("--nsamples", type=positive_int, default=nsamples, help="calibration samples (default: %(default)s)")
    update = "SparseGPT compensates for pruned weights in the kept ones of the layer (default: no)"
    add("--enable-update", action="store_true", help=update)
    mode = "inputs of layers: of the dense model, or of each block after those before it are pruned"
    given = f"{mode} (default: dense for Wanda, sequential for the others)"
    add("--calibration-mode", choices=CALIBRATIONS, help=given)
    add("--offload", action="store_true", help=OFFLOAD)
    saved = "file for the pruned weights, .safetensors, or as torch.save writes them (default: none)"
    add("--save-model", type=Path, help=saved)


def plan_of(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Return what a plan is built with, name -> value: its options that are given, and what is wanted."""
    given = {"calibration_mode": args.calibration_mode, "enable_update": args.enable_update, "offload": args.offload}
    given |= {"pattern": target.pattern, "sparsities": [target.sparsity] if target.sparsity is not None else []}
    return {name: value for name, value in given.items() if value}


def check_oneshot(args: argparse.Namespace) -> Target:
    """Return the target that is asked for. Raises UserError for options that do not go together."""
    if args.enable_update and args.pruner != "sparsegpt":
        raise UserError(f"--enable-update is for sparsegpt: leave it out with --pruner {args.pruner}")
    if args.calibration_mode and args.pruner not in OF_INPUTS:
        raise UserError(f"--calibration-mode is for {', '.join(OF_INPUTS)}, got --pruner {args.pruner}")
    if args.sparsity is not None:
        if args.N or args.M:
            raise UserError("--sparsity is for zeros anywhere, --N and --M are for those in a pattern: leave one out")
        sparsities = parse_sparsities(args.sparsity)
        if len(sparsities) > 1:
            raise UserError(f"--sparsity {args.sparsity}: give one; prune.py takes several")
        return Target(None, sparsities[0])
    n, m = args.N or USUAL[0], args.M or USUAL[1]
    if not n < m:
        raise UserError(f"--N {n} --M {m}: N weights are kept of every M, so N must be below M")
    return Target(parse_pattern(f"{n}:{m}"))
