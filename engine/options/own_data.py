"""Options of scripts that fine-tune on a user's own data, named as the keys of `configs.task.OwnDataConfig`."""

import argparse

from configs.foreign import PUBLISHED
from engine.options.command_line import share
from sparsity.errors import UserError


def add_own_data_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add `--data`, `--val_data`, `--val_fraction` and `--check_data`. kind: "captions" or "questions"."""
    add = parser.add_argument_group("data of one's own, see docs/data.md").add_argument
    others = ", a folder of images with captions, or shards (.tar)" if kind == "captions" else ""
    add("--data", metavar="PATH", help=f"{kind}.json or .jsonl{others} (default: the configuration's data)")
    add("--val_data", metavar="PATH", help="what the best weights are chosen by, as --data (default: --val_fraction)")
    add("--val_fraction", type=share, help="share of the images of --data that is held out for that (default: 0.1)")
    only = "only read all of --data and --val_data, and list what is wrong with them (default: no)"
    add("--check_data", action="store_true", help=only)


def check_own_data_options(args: argparse.Namespace, foreign: bool) -> None:
    """Raise UserError for options that say nothing: of data without `--data`, of models of other libraries with one of
    this project's.
    """
    for option in ("val_data", "val_fraction"):
        if vars(args)[option] is not None and not args.data:
            raise UserError(f"--{option} is for data of one's own: give --data, too, or leave it out")
    if not foreign and args.weights_key is not None:
        raise UserError(f"--weights_key is for models of transformers: leave it out with {args.model}")
    if not foreign and args.weights == PUBLISHED:
        raise UserError(f"--pretrained is for models of transformers: leave it out with {args.model}")
