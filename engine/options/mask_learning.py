"""Options of maskllm_train.py, under the names of the public code and of timm's training script."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.decoding import Decoding
from engine.options.command_line import (
    add_decoding_options,
    check_loggers,
    count,
    decoding,
    positive_float,
    positive_int,
    share,
)
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable
from sparsity.learned.schedule import RECIPES, Recipe
from sparsity.pattern import parse_pattern

MODES = ("maskllm", "sparse", "dense")
UNITS = ("epoch", "step")
SCHEDULERS = ("cosine", "constant", "step", "poly", "tanh", "none")
# Where a preset differs from timm's defaults: what is not given on the command line.
PRESETS: dict[str, dict[str, Any]] = {
    "vit": {"opt": "adamw", "lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.01, "epochs": 20},
    "vit-1epoch": {"opt": "adamw", "lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.01, "epochs": 1},
    "llm": {
        "opt": "adamw",
        "lr": 5e-5,
        "min_lr": 5e-6,
        "weight_decay": 0.1,
        "opt_betas": [0.9, 0.95],
        "clip_grad": 1.0,
        "schedule_unit": "step",
        "epochs": 1,
    },
}


def add_learning_options(parser: argparse.ArgumentParser, presets: tuple[str, ...]) -> None:
    """Add the options of what is learned, how it is sampled, and from what it begins."""
    add = parser.add_argument_group("masks").add_argument
    mode = "learn masks, or train under one, or without (default: %(default)s)"
    add("--sparsity-mode", choices=MODES, default="maskllm", help=mode)
    add("--N", type=positive_int, default=2, help="weights kept (default: %(default)s)")
    add("--M", type=positive_int, default=4, help="of so many (default: %(default)s)")
    add("--mask-only", action="store_true", help="the weights stay as they are (default: they are trained, too)")
    add("--hard", action="store_true", help="compute with sampled masks, not with mixtures of them (default: no)")
    add("--preset", choices=presets, default="vit", help="what is not given otherwise (default: %(default)s)")
    pair = {"nargs": 2, "type": float, "metavar": ("FIRST", "LAST")}
    add("--tau-range", **pair, help="temperature of the samples; default: the preset's, of vit 4 0.05")
    add("--scaling-range", **pair, help="factor of the gates; default: the preset's, of vit 10 100")
    add("--schedule-unit", choices=UNITS, help="what tau, scaling and learning rate follow (default: epoch; llm: step)")
    add("--gate-std", type=positive_float, help="of the first gates; default: the preset's, of vit 0.2")
    add("--sparse-checkpoint", type=Path, help="prior: a mask file, or a checkpoint with zeros (default: none)")
    updated = "checkpoint: begin with its weights where the prior keeps them (default: the model's own)"
    add("--prior-weights", type=Path, help=updated)
    add("--prior-strength", type=float, default=3.0, help="in standard deviations of the gates (default: %(default)s)")
    regulariser = "r of: loss - r * ||weight * mask||^2 (default: %(default)s)"
    add("--sparse-weight-reg", type=float, default=1e-5, help=regulariser)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Data, augmentation, optimizer and results: the options of timm's training script that are of use here."""
    _add_data(parser)
    _add_optimization(parser)
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, default=Path("output/maskllm"), help="default: ./%(default)s")
    add("--experiment", help="folder in --output; default: model, pattern and prior")
    add("--resume", type=Path, help="checkpoint to go on from, and to write; default: last.pt in the folder")
    add("--log-interval", type=positive_int, default=50, help="steps (default: %(default)s)")
    add("--save-every", type=positive_int, help="steps from checkpoint to checkpoint; default: an epoch")
    add("--evaluate", action="store_true", help="of models that are not timm's: measure after each epoch (default: no)")
    add("--log-wandb", action="store_true", help="log to Weights & Biases (default: no)")
    add("--wandb-project", default="maskllm", help="default: %(default)s")
    add("--wandb-offline", action="store_true", help="keep what --log-wandb logs, for `wandb sync` (default: no)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("classifiers of timm: model and data").add_argument
    add("--pretrained", action="store_true", help="with the published weights (default: no)")
    add("--initial-checkpoint", type=Path, help="weights to begin from (default: none)")
    add("--num-classes", type=positive_int, help="default: the model's")
    add("--img-size", "--image-size", type=positive_int, help="default: the model's")
    path = "folder with train/ and val/, each with a folder of images for each class; cifar10, cifar100 or bundled"
    add("--data-dir", "--data-path", dest="data_path", metavar="PATH", help=f"{path} (default: data/imagenet)")
    of_an_epoch = "bundled images of an epoch (default: %(default)s)"
    add("--train-images", type=positive_int, default=5004, help=of_an_epoch)
    add("--val-images", type=positive_int, help="to choose the best by (default: all)")
    add("--test-images", type=positive_int, help="bundled images to test with at the end (default: all)")
    add("--mean", type=float, nargs=3, help="of the images' colours; default: the model's")
    add("--std", type=float, nargs=3, help="default: the model's")
    add("--crop-pct", type=positive_float, help="default: the model's")
    add("--interpolation", help="default: the model's")
    add("-j", "--workers", type=count, help="processes that read (default: the configuration's, of timm's 4)")
    add_decoding_options(add)
    add = parser.add_argument_group("classifiers of timm: augmentation").add_argument
    add("--aa", help="AutoAugment policy of timm, as rand-m8-inc1-mstd101 (default: none)")
    add("--reprob", type=share, default=0.0, help="share of images with random erasing (default: %(default)s)")
    add("--remode", default="pixel", choices=("pixel", "const", "rand"), help="default: %(default)s")
    add("--hflip", type=share, default=0.5, help="share of mirrored images (default: %(default)s)")
    add("--color-jitter", type=float, default=0.4, help="default: %(default)s")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], help="of random crops (default: %(default)s)")
    add("--ratio", type=float, nargs=2, default=[0.75, 4 / 3], help="of their sides (default: 3:4 to 4:3)")
    add("--mixup", type=float, default=0.0, help="alpha (default: %(default)s)")
    add("--cutmix", type=float, default=0.0, help="alpha (default: %(default)s)")
    add("--mixup-prob", type=share, default=1.0, help="share of batches with either (default: %(default)s)")
    add("--smoothing", type=share, default=0.1, help="of labels (default: %(default)s)")
    add("--drop-path", type=share, help="rate (default: the model's)")


def _add_optimization(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    of_preset = "default: the preset's"
    add("--opt", help=f"of timm; {of_preset}, adamw")
    add("--opt-betas", type=float, nargs="+", help=of_preset)
    add("--opt-eps", type=positive_float, help="default: the optimizer's")
    add("--momentum", type=share, default=0.9, help="default: %(default)s")
    add("--lr", type=positive_float, help=of_preset)
    add("--weight-decay", type=float, help=of_preset)
    add("--sched", choices=SCHEDULERS, default="cosine", help="of timm (default: %(default)s)")
    add("--min-lr", type=float, help=of_preset)
    add("--warmup-epochs", type=count, default=0, help="default: %(default)s")
    add("--warmup-lr", type=float, default=1e-5, help="default: %(default)s")
    add("--decay-epochs", type=positive_float, help="of --sched step (default: none)")
    add("--decay-rate", type=share, default=0.1, help="of --sched step (default: %(default)s)")
    add("--epochs", type=positive_int, help=of_preset)
    add("--steps", type=positive_int, help="in place of --epochs (default: none)")
    images = "in a step on each device (default: the configuration's, of classifiers of timm 128)"
    add("-b", "--batch-size", type=positive_int, help=images)
    of_an_epoch = "batches of an epoch, of models that are not timm's (default: %(default)s)"
    add("--num_batches", "--num-batches", type=positive_int, default=500, help=of_an_epoch)
    add("--clip-grad", type=positive_float, help="norm of the gradient (default: the preset's)")
    add("--model-ema", action="store_true", help="the result is a moving average (default: no)")
    add("--model-ema-decay", type=share, default=0.9998, help="default: %(default)s")
    add("--amp", action="store_true", help="mixed precision (default: no)")
    add("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    add("--torchcompile", action="store_true", help="compile the model (default: no)")


def fill_from_preset(args: argparse.Namespace) -> None:
    """Give each option that is not given the preset's value."""
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.schedule_unit = args.schedule_unit or UNITS[0]


def image_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are given in place of those of the model's own data configuration."""
    given = {name: getattr(args, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    return {name: value for name, value in given.items() if value is not None}


def check_learning(args: argparse.Namespace) -> Recipe:
    """The course of tau and scaling; also resolves pattern, precision and folder. UserError for what cannot be."""
    decoding(args)
    args.pattern = parse_pattern(f"{args.N}:{args.M}")
    given = {"tau": args.tau_range, "scaling": args.scaling_range, "gate_std": args.gate_std}
    recipe = replace(RECIPES[args.preset], **{name: value for name, value in given.items() if value is not None})
    for option, path in {
        "sparse-checkpoint": args.sparse_checkpoint,
        "initial-checkpoint": args.initial_checkpoint,
        "prior-weights": args.prior_weights,
    }.items():
        if path is not None and not path.is_file():
            raise MissingFileError(f"--{option} {path}: file not found")
    if args.sparsity_mode == "sparse" and args.sparse_checkpoint is None:
        raise UserError("--sparsity-mode sparse trains under a fixed mask: give it with --sparse-checkpoint")
    if args.prior_weights and args.sparse_checkpoint is None:
        raise UserError("--prior-weights are those of a prior: give it with --sparse-checkpoint")
    if args.amp:
        args.precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}[args.amp_dtype]
    args.experiment = args.experiment or experiment(args)
    args.folder = args.output / args.experiment
    check_writable(args.folder, "--output")
    check_loggers({"wandb": args.log_wandb, "tensorboard": False})
    return recipe


def check_undecoded(args: argparse.Namespace) -> None:
    """Raise UserError where options say how images become pictures, which the configuration of this model says."""
    if decoding(args) != Decoding():
        told = f"of {args.model} `decoding:` in the configuration says that (--config FILE)"
        raise UserError(f"--exif-rotation, --transparency and --max-pixels are for classifiers of timm: {told}")


def experiment(args: argparse.Namespace) -> str:
    """The folder of a run unless told otherwise: other models, patterns, modes and priors have other ones."""
    parts = [args.model.replace("/", "_").replace(":", "_"), f"{args.N}of{args.M}"]
    parts += [args.sparsity_mode] if args.sparsity_mode != MODES[0] else []
    return ".".join([*parts, *([args.sparse_checkpoint.stem] if args.sparse_checkpoint else [])])
