"""Put the accuracies of N:M methods beside each other, and beside the published ones.

    python nm_table.py output/nm_table/results

It reads FOLDER/<method>/<seed>.json, which scripts/nm_table.sh makes with timm_validate.py and maskllm_train.py, prints
a table in Markdown and writes it to FOLDER/table.md.
"""

import argparse
from pathlib import Path

from engine.launch import run
from engine.options.command_line import Parser
from engine.reports.nm_table import write_table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    path, table = write_table(parse(arguments).folder)
    print(f"{table}\n\nresults: {path}")


if __name__ == "__main__":
    run(main)
