"""The options of recovery: training of what is kept, after pruning, against the dense model."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from engine.options.command_line import positive_float, positive_int, share
from sparsity.errors import UserError

LR, WIDTH = 3e-4, 192  # vit-mini gains from three times as much, xvlm-mini from a third (docs/results.md)


def usual_lr(widths: Sequence[int]) -> float:
    """Return the peak rate for layers of so many inputs: what Adam moves an output by in a step is in proportion to
    these and to the rate (arXiv 2203.03466), so that the rate is in inverse proportion to the median.
    """
    return LR * min(1.0, WIDTH / statistics.median(widths))


@dataclass(frozen=True)
class RecoveryOptions:
    """How what is kept is trained.

    steps: of the optimizer. lr: the peak rate, reached after the share `warmup` of the steps, then a cosine to 0; None:
    `usual_lr` of the model.
    rounds: of calibration batches in a step, on all devices together; a round is one batch of each kind of data.
    save_every: steps between two checkpoints.
    """

    steps: int
    lr: float | None = None
    warmup: float = 0.1
    rounds: int = 4
    save_every: int = 100


def add_recovery_options(parser: argparse.ArgumentParser) -> None:
    """`--recover STEPS`, and `--recover_NAME` for each other field of `RecoveryOptions`."""
    add = parser.add_argument_group("recovery, after pruning").add_argument
    told = (
        "train all that is kept for so many steps, on the calibration data and without labels, to give what the dense"
    )
    add("--recover", type=positive_int, metavar="STEPS", help=f"{told} model gives (default: no)")
    usual = RecoveryOptions(1)
    rate = f"{LR:g} for layers of at most {WIDTH} inputs, for wider ones in proportion less"
    add("--recover_lr", type=positive_float, help=f"peak of the learning rate (default: {rate})")
    add("--recover_warmup", type=share, help=f"share of the steps until then (default: {usual.warmup:g})")
    rounds = "calibration batches of each kind in a step, on all devices together"
    add("--recover_rounds", type=positive_int, help=f"{rounds} (default: {usual.rounds})")
    saved = "steps between two checkpoints, from which a killed run goes on"
    add("--recover_save_every", type=positive_int, help=f"{saved} (default: {usual.save_every})")


def recovery_options(args: argparse.Namespace) -> RecoveryOptions | None:
    """Return what the options of `add_recovery_options` say; None without `--recover`. UserError for what cannot be."""
    names = [field.name for field in fields(RecoveryOptions) if field.name != "steps"]
    given = {name: getattr(args, f"recover_{name}") for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if args.recover is None:
        if given:
            raise UserError(f"--recover_{next(iter(given))} is for --recover STEPS: give that, or leave it out")
        return None
    chosen, ranks = RecoveryOptions(args.recover, **given), args.devices * args.num_nodes
    if chosen.rounds % ranks:
        raise UserError(
            f"--recover_rounds {chosen.rounds} cannot be shared by {ranks} devices: give a multiple of that"
        )
    return chosen
