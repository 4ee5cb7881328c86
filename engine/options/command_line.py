"""Command lines: a parser whose every complaint is one line, types of arguments, and the options that scripts share."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from configs.decoding import GROUNDS, Decoding
from engine.exit_codes import BAD_INPUT
from engine.options.allocation import add_allocation_options, add_mask_options, check_mask_options, resolved
from sparsity.allocation.budget import SCHEDULES, parse_sparsities
from sparsity.errors import UserError
from sparsity.pattern import NM, pattern_of
from sparsity.run.axes import BOUNDS, CALIBRATIONS, POOLS, RECONSTRUCTIONS, SCOPES, dense_share

ROW_DTYPES = ("float32", "bfloat16")  # of sparsity.statistics.gradient_rows, which needs torch
OFFLOAD = "keep what Wanda and SparseGPT add up in the processor's memory, not the accelerator's (default: no)"

OPTIONAL = {"wandb": ("wandb", "wandb"), "tensorboard": ("tensorboard", "tensorboard")}  # option -> module, package


class Parser(argparse.ArgumentParser):
    """Description as it is written, no abbreviations; an error is one line, without the usage, and exit code 2."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The arguments; an option that is not known is an error that suggests the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            given = unknown[0].split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1) if given.startswith("-") else []
            self.error(f"unrecognized argument {given}" + (f", did you mean {near[0]}?" if near else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {message} (python {self.prog} --help lists all options)\n")


def _checked(convert: Callable[[str], Any], ok: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """argparse type: what `convert` makes of the text, where it is `ok`."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not ok(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive_int = _checked(int, lambda v: v >= 1, "an integer of at least 1")
positive_float = _checked(float, lambda v: 0 < v < math.inf, "a number above 0")
count = _checked(int, lambda v: v >= 0, "an integer of at least 0")
share = _checked(float, lambda v: 0 <= v <= 1, "a fraction between 0 and 1")
seed = _checked(int, lambda v: 0 <= v < 2**32, "an integer from 0 to 2^32 - 1")


_number_or_auto = _checked(float, lambda v: 0 < v < math.inf, "a number above 0, or auto")


def damp(text: str) -> float | str:
    """argparse type: a number above 0, or "auto"."""
    return text if text == "auto" else _number_or_auto(text)


def target(text: str) -> str:
    """argparse type: same, dense, or dense:A."""
    try:
        dense_share(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def globs(text: str) -> list[str]:
    """argparse type: comma separated globs."""
    found = [glob.strip() for glob in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected globs like *.mlp.*,*.attn.*, got {text!r}")
    return found


def add_config_options(parser: argparse.ArgumentParser, task: str) -> None:
    """What is read: `--config`, `--variant`, `--weights`, `--max_skipped` (see configs.loading)."""
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=Path, help=f"default: configs/<model>/{task}_<variant>.yaml")
    variants = "auto (default): base where its weights are, else mini"
    add("--variant", choices=("auto", "base", "mini"), default="auto", help=variants)
    add("--weights", help="checkpoint file, or 'random'; default: the configuration's")
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")


def add_finetuning_options(
    parser: argparse.ArgumentParser, task: str, models: Sequence[str], *, measures: bool = True
) -> None:
    """What every script that fine-tunes has: model and mask, configuration, where a run is kept, logs, devices.

    `-m` is the mask here. `--pretraining_weights` is `weights` in the result. models: where there is one, it need not
    be named. measures: whether there is something to evaluate.
    """
    add = parser.add_argument
    only = models[0] if len(models) == 1 else None
    listed = f"default: {only}" if only else ", ".join(models)
    add("--model", required=only is None, default=only, metavar="MODEL", help=listed)
    add("-m", "--mask", type=Path, help="mask file of the pretrained model; default: none, with --dense")
    add("--dense", action="store_true", help="train the dense model, whatever --mask says (default: no)")
    add("--output_dir", type=Path, help="default: output/<model>_<configuration>/<mask, or dense>")
    add("--snapshot", type=Path, help="checkpoint to go on from, and to write; default: last.pt in --output_dir")
    add("--incremental", action="store_true", help="stop after one epoch; the same command goes on (default: no)")
    add("--skip_eval", action="store_true", help="train only; the last weights are the result (default: no)")
    if measures:
        what = "train nothing: evaluate the run in --output_dir, or where there is none the weights as they are given"
        add("--evaluate", action="store_true", help=f"{what} (default: no)")
    add("--debug", action="store_true", help="a few steps per epoch, a few images to evaluate (default: no)")
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=Path, help=f"default: configs/<model>/{task}.yaml, or {task}_mini.yaml of the bundled model")
    variants = "auto (default): base where its weights are, else mini"
    add("--variant", choices=("auto", "base", "mini"), default="auto", help=variants)
    weights = "pretrained checkpoint file, or 'random'; default: the configuration's"
    add("-pre", "--pretraining_weights", dest="weights", metavar="WEIGHTS", help=weights)
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")
    add = parser.add_argument_group("logs, besides log.csv in --output_dir").add_argument
    add("-wdb", "--wandb", action="store_true", help="log to Weights & Biases (default: no)")
    add("--wdb_offline", action="store_true", help="keep what --wandb logs, for `wandb sync` (default: no)")
    add("-exp", "--experiment_name", help="of the run on Weights & Biases; default: the configuration's")
    add("--tensorboard", action="store_true", help="log to TensorBoard, in --output_dir (default: no)")
    add_device_options(parser, "-p")
    parser.set_defaults(precision="bf16-mixed", **({} if measures else {"evaluate": False}))


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """`--workers`, `--max-skipped`, and what `configs.decoding.Decoding` has, where no configuration says it."""
    add = parser.add_argument_group("image files").add_argument
    add("--workers", type=count, default=0, help="processes that read images (default: %(default)s)")
    add("--max-skipped", type=share, default=0.01, help="share of unreadable images tolerated (default: %(default)s)")
    add_decoding_options(add)


def add_decoding_options(add: Callable[..., Any]) -> None:
    """Add the options of `configs.decoding.Decoding`. add: of the parser or of a group of it."""
    default = Decoding()
    add("--exif-rotation", action="store_true", help="turn images as their EXIF data says (default: no)")
    ground = "what is under transparent pixels: what is stored there, or white (default: %(default)s)"
    add("--transparency", choices=GROUNDS, default=default.transparency, help=ground)
    most = "larger images are not decoded (default: %(default)s)"
    add("--max-pixels", type=positive_int, default=default.max_pixels, help=most)


def decoding(args: argparse.Namespace) -> Decoding:
    """Return what the options of `add_decoding_options` say; UserError for what cannot be."""
    return Decoding(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)})


def add_device_options(parser: argparse.ArgumentParser, *short: str) -> None:
    """`--devices`, `--num_nodes`, `--accelerator`, `--strategy`, `--precision`, `--seed`, as every script has them.

    short: other names of `--precision`.
    """
    add = parser.add_argument_group("devices").add_argument
    add("-d", "--devices", type=positive_int, default=1, help="devices per node (default: %(default)s)")
    add("--num_nodes", type=positive_int, default=1, help="nodes, under SLURM or torchrun (default: %(default)s)")
    add("--strategy", default="auto", choices=("auto", "ddp"), help="default: %(default)s")
    _add_arithmetic(add, *short)
    add("--seed", type=seed, default=42, help="of all randomness (default: %(default)s)")
    add("--verbose", action="store_true", help="log more, such as the order in which blocks are executed (default: no)")


def add_one_device(parser: argparse.ArgumentParser) -> None:
    """`--accelerator` and `--precision`: for scripts that run on one device, with seeds of their own."""
    _add_arithmetic(parser.add_argument_group("device").add_argument)
    parser.set_defaults(devices=1, num_nodes=1, strategy="auto", seed=42)


def _add_arithmetic(add: Callable[..., Any], *short: str) -> None:
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "mps"), help="default: %(default)s")
    precisions = ("32-true", "bf16-mixed", "16-mixed")
    arithmetic = "arithmetic of the forward (default: %(default)s)"
    add(*short, "--precision", default="32-true", choices=precisions, help=arithmetic)
    add("--tf32", action="store_true", help="float32 products on the tensor cores, with 10 bits (default: no)")
    add("--deterministic", action="store_true", help="the same bits in each run, also on a GPU; slower (default: no)")


def check_loggers(wanted: Mapping[str, bool]) -> None:
    """UserError where the package of a logger that is wanted is not installed; does not import it."""
    for option, (module, package) in OPTIONAL.items():
        if wanted[option] and importlib.util.find_spec(module) is None:
            raise UserError(f"--{option} needs a package that is not installed: pip install {package}")
