"""`--check_data` of the scripts that fine-tune: all that is wrong with a user's own data."""

from argparse import Namespace

from datasets.own.check import check_own
from sparsity.errors import UserError

SHOWN = 100  # faults of each file; the others are counted


def report_own_data(args: Namespace, kind: str) -> None:
    """Print what `--data` and `--val_data` hold and what is wrong with them. kind: "captions" or "questions".

    Raises UserError where something is, and where there is no `--data`.
    """
    if not args.data:
        raise UserError("--check_data reads what --data names: give it")
    faults = 0
    for path in filter(None, (args.data, args.val_data)):
        checked = check_own(path, kind)
        print(checked)
        for fault in checked.faults[:SHOWN]:
            print(f"  {fault}")
        if len(checked.faults) > SHOWN:
            print(f"  and {len(checked.faults) - SHOWN:,} more")
        faults += len(checked.faults)
    if faults:
        raise UserError(f"--data: {faults:,} faults, listed above; docs/data.md shows what is expected")
