"""The options of the one-shot pruning scripts; needs no torch, so that they are checked at once."""

import argparse
from pathlib import Path

from engine.options import CALIBRATION_MODES, OFFLOAD, positive_int
from sparsity.pattern import NM, parse_pattern

PRUNERS = {"dense": None, "magnitude": "magnitude", "random": "rand", "wanda": "wanda", "sparsegpt": "sparsegpt"}


def add_oneshot_options(parser: argparse.ArgumentParser, nsamples: int) -> None:
    """`--pruner`, `--N`, `--M`, `--nsamples`, `--enable-update`, `--calibration-mode`, `--offload`,
    `--save-model`.

    nsamples: the default.
    """
    add = parser.add_argument_group("pruning").add_argument
    add("--pruner", default="sparsegpt", choices=PRUNERS, help="default: %(default)s")
    add("--N", type=positive_int, default=2, help="weights kept of every M (default: %(default)s)")
    add("--M", type=positive_int, default=4, help="consecutive weights of a row (default: %(default)s)")
    add("--nsamples", type=positive_int, default=nsamples, help="calibration samples (default: %(default)s)")
    update = "SparseGPT makes up for what goes in the other weights of the layer (default: no)"
    add("--enable-update", action="store_true", help=update)
    mode = "inputs of Wanda and SparseGPT: of the dense model, or of each block after those before it are pruned"
    given = f"{mode} (default: dense for Wanda, sequential for SparseGPT)"
    add("--calibration-mode", choices=CALIBRATION_MODES, help=given)
    add("--offload", action="store_true", help=OFFLOAD)
    add("--save-model", type=Path, help="file for the pruned weights, .safetensors, or as torch.save writes them")


def check_oneshot(args: argparse.Namespace) -> NM:
    """The pattern. Raises ValueError for options that do not go together."""
    if args.enable_update and args.pruner != "sparsegpt":
        raise ValueError(f"--enable-update is for sparsegpt: leave it out with --pruner {args.pruner}")
    if args.calibration_mode and args.pruner not in ("wanda", "sparsegpt"):
        raise ValueError(f"--calibration-mode is for wanda and sparsegpt, got --pruner {args.pruner}")
    if not args.N < args.M:
        raise ValueError(f"--N {args.N} --M {args.M}: N weights are kept of every M, so N must be below M")
    return parse_pattern(f"{args.N}:{args.M}")
