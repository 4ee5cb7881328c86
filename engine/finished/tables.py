"""Tables and pages of runs that are finished, beside each other."""

from argparse import Namespace

from engine.finished import finetuning_table, nm_table, quality_table
from engine.finished.page import write_page
from engine.finished.records import write_records
from engine.finished.tradeoff import write_tradeoff


def finished_table(args: Namespace) -> str:
    """Write what is wanted of the folder that is given, and return it for the reader of the terminal.

    args: `finetuned` (with `metrics`), `nm`, `quality`, `pruned`, `records` and `tradeoff`, one of which is a folder.
    """
    if args.pruned:
        path, table = write_page(args.pruned)
    elif args.records:
        path, table = write_records(args.records)
    elif args.tradeoff:
        path, table = write_tradeoff(args.tradeoff)
    elif args.finetuned:
        path, table = finetuning_table.write_table(args.finetuned, args.metrics)
    elif args.nm:
        path, table = nm_table.write_table(args.nm)
    else:
        path, table = quality_table.write_table(args.quality)
    return f"{table}\n\nresults: {path}"
