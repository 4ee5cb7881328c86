"""Options that say how much each layer loses; needs no torch."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.allocation import ENDINGS, read_allocation
from sparsity.errors import UserError
from sparsity.run.axes import ALLOCATIONS, WITHIN


def add_allocation_options(add: Callable[..., Any], share: Callable[[str], float]) -> None:
    """Add --allocation and its bounds. add: of the parser or of a group of it. share: argparse type of fractions."""
    names = ", ".join((*ALLOCATIONS.names(), "error:output"))
    given = f"how much each layer loses: {names}, or FILE.yaml of layer or group: sparsity (default: the pruner's)"
    add("--allocation", type=allocation, metavar="ALLOCATION", help=given)
    within = "among which layers the budget is shared out: all, or those of each modality (default: model)"
    add("--allocation_within", choices=WITHIN, default="model", help=within)
    add("--min_keep", type=share, default=0.0, help="fraction that each layer keeps at least (default: %(default)s)")
    add("--max_keep", type=share, default=1.0, help="fraction that each layer keeps at most (default: %(default)s)")


def add_mask_options(add: Callable[..., Any]) -> None:
    """Add --save_allocation, --from_mask and --from_weights."""
    saved = "write how much each layer loses, to be edited and given to --allocation; for one sparsity (default: no)"
    add("--save_allocation", type=Path, metavar="FILE.yaml", help=saved)
    begun = "mask file whose zeros stay and count towards the sparsity (default: the dense model)"
    add("--from_mask", type=Path, metavar="FILE", help=begun)
    updated = "the updated weights of that run, its ..._weights.safetensors (default: the model's own)"
    add("--from_weights", type=Path, metavar="FILE", help=updated)


def allocation(text: str) -> str:
    """argparse type: the name of an allocation, or a file of one."""
    if not text.endswith(ENDINGS):
        try:
            ALLOCATIONS.check(text.partition(":")[0])
        except UserError as error:
            raise argparse.ArgumentTypeError(f"{error}, or FILE.yaml") from None
    return text


def resolved(value: Any) -> Any:
    """Return what a plan takes: the rules where the value is the name of a file, else the value. UserError for a file
    that cannot be read.
    """
    if not (isinstance(value, str) and value.endswith(ENDINGS)):
        return value
    if not Path(value).is_file():
        raise UserError(f"--allocation {value}: there is no such file")
    return read_allocation(value)


def check_mask_options(args: argparse.Namespace) -> None:
    """Raise UserError for options of `add_mask_options` that cannot be, before anything is loaded."""
    if args.save_allocation and len(args.sparsities or ()) > 1:
        raise UserError("--save_allocation writes what one sparsity takes from each layer: give one to --sparsities")
    if args.save_allocation and args.save_allocation.suffix not in ENDINGS:
        raise UserError(f"--save_allocation {args.save_allocation}: its name must end in .yaml, to be read again")
    if args.from_mask and args.save_scores:
        raise UserError("--save_scores are those of the dense model: leave it out with --from_mask")
    if args.from_weights and not args.from_mask:
        raise UserError("--from_weights are the updated weights of the run of --from_mask: give that, too")
    files: Mapping[str, Path | None] = {"from_mask": args.from_mask, "from_weights": args.from_weights}
    for option, path in files.items():
        if path and not path.is_file():
            raise UserError(f"--{option} {path}: there is no such file")
