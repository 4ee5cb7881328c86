"""Command lines: a parser whose every complaint is one line, types of arguments, and the options that scripts share."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from configs.decoding import GROUNDS, Decoding
from engine.exit_codes import BAD_INPUT
from engine.options.allocation import add_allocation_options, add_mask_options, check_mask_options, resolved
from engine.options.sparse_training import add_sparse_options
from engine.recipes.expand import RECIPE, RECIPES, Recipe, expanded
from sparsity.allocation.budget import SCHEDULES, parse_sparsities
from sparsity.errors import UserError
from sparsity.pattern import NM, pattern_of
from sparsity.run.axes import (
    BOUNDS,
    CALIBRATED_WITHIN,
    CALIBRATIONS,
    POOLS,
    RECONSTRUCTIONS,
    SCOPES,
    WINDOWS,
    dense_share,
)

ROW_DTYPES = ("float32", "bfloat16")  # of sparsity.statistics.gradient_rows, which needs torch
OFFLOAD = "keep the sums of Wanda and SparseGPT in the memory of the CPU, not of the accelerator (default: no)"

OPTIONAL = {"wandb": ("wandb", "wandb"), "tensorboard": ("tensorboard", "tensorboard")}  # option -> module, package


class Parser(argparse.ArgumentParser):
    """Description as it is written, no abbreviations; an error is one line, without the usage, and exit code 2.

    script: name of a script that takes recipes; `recipe` of the arguments is then what it was given, to be saved.
    """

    def __init__(self, description: str | None, script: str = ""):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self._given: dict[str, str | None] = {}  # long name of an option -> as it was typed; None: without a value
        self._typed: tuple[str, ...] | None = None
        self._expanded: list[str] = []
        self.take_recipes(script)

    def take_recipes(self, script: str) -> None:
        """Add --recipe for a script of this name, without its ending; "" is none."""
        self._script = script
        if script:
            self.add_argument(RECIPE, metavar="FILE[:STAGE]", help=f"{RECIPES} (default: no)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments, those of a recipe first, and what is not known."""
        typed = tuple(sys.argv[1:] if args is None else args)
        if not self._script:
            return super().parse_known_args(typed, namespace)
        if typed != self._typed:
            self._typed, self._expanded = typed, expanded(self, self._script, typed)
        return super().parse_known_args(self._expanded, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        name = next((name for name in action.option_strings if name.startswith("--")), "")
        self._given[name.removeprefix("--")] = " ".join(arg_strings) if arg_strings else None
        return super()._get_values(action, arg_strings)

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The arguments; an option that is not known is an error that suggests the nearest one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if self._script:
            given = {name: text for name, text in self._given.items() if name and f"--{name}" != RECIPE}
            parsed.recipe = Recipe(self._script, given)
        if unknown:
            given = unknown[0].split("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1) if given.startswith("-") else []
            self.error(f"unrecognized argument {given}" + (f", did you mean {near[0]}?" if near else ""))
        return parsed

    def _parse_optional(self, arg_string: str) -> Any:
        """Take - and _ between the words of a long option as the same."""
        name, *value = arg_string.split("=", 1)
        words = name.removeprefix("--")
        spelt = [name, *(f"--{words.replace(*pair)}" for pair in ("-_", "_-") if name.startswith("--"))]
        known = next((option for option in spelt if option in self._option_string_actions), name)
        return super()._parse_optional("=".join([known, *value]))

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


def among(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """Return the argparse type of a comma separated list of known words. what: such a word is."""

    def parse(text: str) -> list[str]:
        found = [item.strip() for item in text.split(",")]
        if unknown := [item for item in found if item not in known]:
            raise argparse.ArgumentTypeError(f"there is no {what} {unknown[0]!r}; there are {', '.join(known)}")
        return found

    return parse


def seeds(text: str) -> list[int]:
    """argparse type: a comma separated list of seeds, each once."""
    return list(dict.fromkeys(seed(item) for item in text.split(",")))


def byte_count(text: str) -> int:
    """argparse type: bytes, as "4GB" or "500 MB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or len(match[1]) > 20:
        raise argparse.ArgumentTypeError(f"expected bytes like 4GB or 500MB, got {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


# The axes of a plan, and the options of single scores and reconstructions; those that are given go to the plan.
PLAN = ("pool", "allocation", "scope", "reconstruct", "calibration_mode", "offload", "epochs", "schedule", "lambda_")
PLAN += BOUNDS
PLAN += ("memory_budget", "row_dtype", "mask_lr", "mask_decay", "enable_update", "damp", "rounds")
PLAN += ("calibrate_within", "target", "correct_bias", "swaps", "layer_errors", "block_steps", "block_window")


def add_pruner_options(parser: argparse.ArgumentParser) -> None:
    """The options of `PLAN`: the axes, and what single methods have."""
    add = parser.add_argument_group("plan").add_argument
    add("--pool", choices=POOLS, help="one word for --allocation and --scope (default: the pruner's)")
    add_allocation_options(add, share)
    add("--scope", choices=SCOPES, help="what competes within a layer; block: 128 columns (default: the pruner's)")
    updates = ("none", *RECONSTRUCTIONS.names())
    add(
        "--reconstruct",
        choices=updates,
        help="what updates the weights that are kept (default: the pruner's)",
    )
    update = "-p sparsegpt as published: it also updates the kept weights (default: no)"
    add("--enable_update", "--enable-update", action="store_true", help=update)
    mode = "inputs of layers: of the dense model, or of each block after those before it are pruned"
    given = f"{mode} (default: sequential for SparseGPT and with --reconstruct, else dense)"
    add("--calibration_mode", "--calibration-mode", choices=CALIBRATIONS, help=given)
    parts = "what sequential calibration measures at a time; stage: the layers of a block that read the same input"
    add("--calibrate_within", choices=CALIBRATED_WITHIN, help=f"{parts} (default: block)")
    add("--offload", action="store_true", help=OFFLOAD)
    add("-e", "--epochs", type=positive_int, default=1, help="pruning steps (default: %(default)s)")
    add("--schedule", choices=SCHEDULES, default="exp", help="how the sparsity rises (default: %(default)s)")
    add_reconstruction_options(add)
    add("--lambda_", type=positive_float, default=1e-5, help="ridge penalty of CHITA (default: %(default)s)")
    held = "gradients that CHITA holds in memory, e.g. 500MB; more go to files in the output folder (default: 4GB)"
    add("--memory_budget", type=byte_count, default=byte_count("4GB"), help=held)
    captured = "inputs of blocks that sequential calibration holds in memory; more go to a file (default: half of it)"
    add("--capture_budget", type=byte_count, help=captured)
    add("--row_dtype", choices=ROW_DTYPES, default="float32", help="of CHITA's gradients (default: %(default)s)")
    add("--mask_lr", type=positive_float, default=5e-5, help="first learning rate of TAMT (default: %(default)s)")
    add("--mask_decay", type=share, default=0.01, help="weight decay of TAMT (default: %(default)s)")


def add_reconstruction_options(add: Callable[..., Any]) -> None:
    """Add what works on layers or blocks one by one: `--damp`, `--rounds`, `--target`, `--correct_bias`, `--swaps`,
    `--layer_errors` and `--block_steps`.
    """
    held_out = "0.001, 0.01 or 0.1, chosen for each layer on a tenth of the samples that is held out"
    add("--damp", type=damp, default=0.01, help=f"damping of Gram matrices; auto: {held_out} (default: %(default)s)")
    usual = "lsq 100, conjugate gradients; admm 20; alps 300"
    add("--rounds", type=positive_int, metavar="N", help=f"rounds of the solver, at most (default: {usual})")
    wanted = "output that layers are fitted to: their own, or A of the dense model's, e.g. dense:0.5 (default: same)"
    add("--target", type=target, metavar="{same,dense[:A]}", help=wanted)
    add("--correct_bias", action="store_true", help="biases keep the mean output of layers (default: no)")
    exchanges = "exchanges of a kept weight for a pruned one in each row, before --reconstruct (default: %(default)s)"
    add("--swaps", type=count, default=0, metavar="K", help=exchanges)
    errors = "report errors of held-out samples, and of a dense target's output, which take more sums (default: no)"
    add("--layer_errors", action="store_true", help=errors)
    trained = "steps that train each pruned block to give what the dense one gives, in sequential calibration"
    add("--block_steps", type=count, default=0, metavar="N", help=f"{trained} (default: %(default)s)")
    add("--block_window", choices=WINDOWS, help="layers of the block that --block_steps trains (default: block)")


def plan_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Return the options of `PLAN` that are given, name -> value."""
    unset = object()
    everything: dict[str, Any] = {action.dest: unset for action in parser._actions}
    parsed, _ = parser.parse_known_args(arguments, argparse.Namespace(**everything))
    given = {name: value for name, value in vars(parsed).items() if name in PLAN and value is not unset}
    return {name: resolved(value) if name == "allocation" else value for name, value in given.items()}


def add_targets(add: Callable[..., Any]) -> None:
    """`--pattern`, `--group_sparsity`, and the masks that a run begins with."""
    both = "N:M, N weights kept of every M, instead of sparsities, e.g. 2:4; or blockRxC, R x C weights as one"
    add("--pattern", help=f"{both} (default: unstructured)")
    groups = "group=sparsity,...: these groups lose that, the others what is left of -s (default: none)"
    add("--group_sparsity", type=group_sparsity, default={}, metavar="GROUPS", help=groups)
    add_mask_options(add)


def resolve_targets(args: argparse.Namespace, usual: str) -> None:
    """Parse `pattern` and `sparsities` of the arguments in place; the latter are None where N:M decides.

    usual: sparsities where neither is given. UserError for options that N:M leaves nothing to decide.
    """
    args.pattern = pattern_of(args.pattern)
    decided = isinstance(args.pattern, NM)
    for option in ("sparsities", "pool", "allocation", "scope"):
        if decided and getattr(args, option) is not None:
            raise UserError(f"--pattern decides which weights are pruned and how many: leave --{option} out")
    args.sparsities = None if decided else parse_sparsities(usual if args.sparsities is None else args.sparsities)
    check_mask_options(args)


def group_sparsity(text: str) -> dict[str, Decimal]:
    """argparse type: comma separated group=sparsity, in per cent or fractions."""
    found: dict[str, Decimal] = {}
    for item in text.split(","):
        group, _, sparsity = (part.strip() for part in item.partition("="))
        if not (group and sparsity) or group in found:
            raise argparse.ArgumentTypeError(f"expected group=sparsity,group=sparsity, got {item!r} in {text!r}")
        try:
            (found[group],) = parse_sparsities(sparsity)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return found


def add_finished_options(add: Callable[..., Any]) -> None:
    """The options of compare.py that only put finished runs beside each other."""
    add("--finetuned", type=Path, metavar="FOLDER", help="only the table of these fine-tuned runs (default: no)")
    add("--metrics", type=globs, default=["*"], help="of --finetuned: comma separated globs (default: all)")
    add("--nm", type=Path, metavar="FOLDER", help="only the table of these N:M results (default: no)")
    add("--quality", type=Path, metavar="FOLDER", help="only tables and curves of these comparisons (default: no)")
    add("--records", type=Path, metavar="FOLDER", help="only the table of these records (default: no)")
    add("--tradeoff", type=Path, metavar="FOLDER", help="only the table of these benchmarks (default: no)")
    add("--pruned", type=Path, metavar="FOLDER", help="only the page of these runs of prune.py (default: no)")


def check_finished(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error unless a model, or one folder of finished runs, is given."""
    folders = (args.finetuned, args.nm, args.quality, args.pruned, args.records, args.tradeoff)
    if sum(given is not None for given in (args.model, *folders)) != 1:
        parser.error("give one of -m/--model, --finetuned, --nm, --quality, --pruned, --records and --tradeoff")


def globs(text: str) -> list[str]:
    """argparse type: comma separated globs."""
    found = [glob.strip() for glob in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected globs like *.mlp.*,*.attn.*, got {text!r}")
    return found


def add_config_options(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the options of what is read: `--config`, `--variant`, `--weights`, `--max_skipped` (see configs.loading)."""
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=Path, help=f"default: configs/<model>/{task}_<variant>.yaml")
    variants = "auto (default): base where its weights are, else mini"
    add("--variant", choices=("auto", "base", "mini"), default="auto", help=variants)
    add("--weights", help="checkpoint file, or 'random'; default: the configuration's")
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")


def add_finetuning_options(parser: Parser, task: str, models: Sequence[str], *, measures: bool = True) -> None:
    """Add the options of scripts that fine-tune: model and mask, configuration, where a run is kept, logs, devices.

    `-m` is the mask here. `--pretraining_weights` is `weights` in the result. models: where there is one, it need not
    be named. measures: whether there is something to evaluate.
    """
    parser.take_recipes(task)
    add = parser.add_argument
    only = models[0] if len(models) == 1 else None
    listed = f"default: {only}" if only else ", ".join(models)
    add("--model", required=only is None, default=only, metavar="MODEL", help=listed)
    add("-m", "--mask", type=Path, help="mask file of the pretrained model; default: none, with --dense")
    add("--dense", action="store_true", help="train the dense model, whatever --mask says (default: no)")
    add("--output_dir", type=Path, help="default: output/<model>_<configuration>/<mask, or dense>")
    add("--snapshot", type=Path, help="checkpoint to resume from, and to write; default: last.pt in --output_dir")
    add("--incremental", action="store_true", help="stop after one epoch; the same command continues (default: no)")
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
    add("-pre", "--pretraining_weights", "--weights", dest="weights", metavar="WEIGHTS", help=weights)
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")
    add_sparse_options(parser, positive_int, share)
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
    add("--seed", type=seed, default=42, help="seed of all random numbers (default: %(default)s)")
    add("--verbose", action="store_true", help="log more, such as the order in which blocks are executed (default: no)")


def add_one_device(parser: argparse.ArgumentParser) -> None:
    """`--accelerator` and `--precision`: for scripts that run on one device, with seeds of their own."""
    _add_arithmetic(parser.add_argument_group("device").add_argument)
    parser.set_defaults(devices=1, num_nodes=1, strategy="auto", seed=42)


def _add_arithmetic(add: Callable[..., Any], *short: str) -> None:
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "mps"), help="default: %(default)s")
    precisions = ("32-true", "bf16-mixed", "16-mixed")
    arithmetic = "precision of the forward pass (default: %(default)s)"
    add(*short, "--precision", default="32-true", choices=precisions, help=arithmetic)
    add("--tf32", action="store_true", help="float32 products on the tensor cores, with 10 bits (default: no)")
    add("--deterministic", action="store_true", help="the same bits in each run on a GPU, too; slower (default: no)")


def check_loggers(wanted: Mapping[str, bool]) -> None:
    """Raise UserError where the package of a logger that is wanted is not installed; does not import it."""
    for option, (module, package) in OPTIONAL.items():
        if wanted[option] and importlib.util.find_spec(module) is None:
            raise UserError(f"--{option} needs a package that is not installed: pip install {package}")
