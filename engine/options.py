"""Command lines: a parser whose every complaint is one line, types of arguments, and the options that scripts share."""

import argparse
import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sparsity.allocation import SCHEDULES

USER_ERROR = 2


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
        self.exit(USER_ERROR, f"error: {message} (python {self.prog} --help lists all options)\n")


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


def seeds(text: str) -> list[int]:
    """argparse type: a comma separated list of seeds, each once."""
    return list(dict.fromkeys(seed(item) for item in text.split(",")))


def add_pruner_options(parser: argparse.ArgumentParser) -> None:
    """The options of single pruners: `--epochs`, `--schedule`, `--lambda_`."""
    add = parser.add_argument
    add("-e", "--epochs", type=positive_int, default=1, help="rounds of iterative pruners (default: %(default)s)")
    add("--schedule", choices=SCHEDULES, default="exp", help="of iterative pruners (default: %(default)s)")
    add("--lambda_", type=positive_float, default=1e-5, help="ridge penalty of CHITA (default: %(default)s)")


def add_config_options(parser: argparse.ArgumentParser, task: str) -> None:
    """What is read: `--config`, `--variant`, `--weights`, `--max_skipped` (see engine.config)."""
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=Path, help=f"default: configs/<model>/{task}_<variant>.yaml")
    variants = "auto (default): base where its weights are, else mini"
    add("--variant", choices=("auto", "base", "mini"), default="auto", help=variants)
    add("--weights", help="checkpoint file, or 'random'; default: the configuration's")
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """`--devices`, `--num_nodes`, `--accelerator`, `--strategy`, `--precision`, `--seed`, as every script has them."""
    add = parser.add_argument_group("devices").add_argument
    add("-d", "--devices", type=positive_int, default=1, help="devices per node (default: %(default)s)")
    add("--num_nodes", type=positive_int, default=1, help="nodes, under SLURM or torchrun (default: %(default)s)")
    add("--strategy", default="auto", choices=("auto", "ddp"), help="default: %(default)s")
    _add_arithmetic(add)
    add("--seed", type=seed, default=42, help="of all randomness (default: %(default)s)")


def add_one_device(parser: argparse.ArgumentParser) -> None:
    """`--accelerator` and `--precision`: for scripts that run on one device, with seeds of their own."""
    _add_arithmetic(parser.add_argument_group("device").add_argument)
    parser.set_defaults(devices=1, num_nodes=1, strategy="auto", seed=42)


def _add_arithmetic(add: Callable[..., Any]) -> None:
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "mps"), help="default: %(default)s")
    precisions = ("32-true", "bf16-mixed", "16-mixed")
    add("--precision", default="32-true", choices=precisions, help="arithmetic of the forward (default: %(default)s)")
