"""The tables of runs that are finished, as compare.py prints them."""

from argparse import Namespace

from engine.reports import finetuning_table, nm_table, quality_table


def finished_table(args: Namespace) -> str:
    """Write the table of the folder that is given, and return it for the reader of the terminal.

    args: `finetuned` (with `metrics`), `nm` and `quality`, one of which is a folder.
    """
    if args.finetuned:
        path, table = finetuning_table.write_table(args.finetuned, args.metrics)
    elif args.nm:
        path, table = nm_table.write_table(args.nm)
    else:
        path, table = quality_table.write_table(args.quality)
    return f"{table}\n\nresults: {path}"
