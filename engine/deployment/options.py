"""The options that export.py and benchmark.py share: a model with its zeros, and where to write."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from configs.loading import configure
from configs.pruning import PRUNE_CONFIGS, PrunedModel
from engine.options import command_line as options
from engine.options.external import add_external_options, check_external
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def add_model_options(parser: argparse.ArgumentParser, folder: str, names: Sequence[str], forms: str) -> None:
    """Add model, mask, output folder, configuration and device. folder: the default. names, forms: of models of this
    project, and of others.
    """
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join((*names, forms)))
    add("--mask", type=Path, help="mask file that prunes the weights (default: none, they have zeros)")
    add("-o", "--output_dir", type=Path, default=Path(folder), help="default: %(default)s")
    options.add_config_options(parser, "prune")
    add_external_options(parser, forms)
    options.add_one_device(parser)


def configured(args: argparse.Namespace, kind: str, names: Sequence[str], forms: str) -> PrunedModel:
    """Return the configuration of a model of this kind; UserError for options of other models."""
    check_external(args, kind == "external", names, forms)
    return configure(args, "prune", PRUNE_CONFIGS[kind])[1]


def check_files(args: argparse.Namespace, config: PrunedModel, option: str, wanted: Sequence[str]) -> None:
    """Raise UserError for files that are not there or cannot be written, and for packages that ONNX needs. option:
    whose value `wanted` is.
    """
    config.check(args.model, evaluate=False)
    if args.mask and not args.mask.is_file():
        raise MissingFileError(f"--mask {args.mask}: there is no such file")
    if {"onnx", "int8"} & set(wanted):
        check_packages(f"{option} onnx,int8")
    check_writable(args.output_dir, "--output_dir")


def check_packages(option: str) -> None:
    """Raise UserError where a package is not installed. option: what needs it."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{option} needs packages that are not installed: pip install {' '.join(missing)}")
