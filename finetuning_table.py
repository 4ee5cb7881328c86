"""Put the metrics of fine-tuned models beside each other, dense and pruned.

    python finetuning_table.py output/finetune_mini
    python finetuning_table.py output/finetune_mini --metrics 'r_mean,cider*,accuracy,top1'

It reads FOLDER/<run>/dense/result/metrics.json and FOLDER/<run>/<sparsity>/result/metrics.json, as the task scripts
write them with --output_dir FOLDER/<run>/<sparsity>, prints a table in Markdown and writes it to FOLDER/table.md.
"""

import argparse
from pathlib import Path

from engine.launch import run
from engine.options.command_line import Parser, globs
from engine.reports.finetuning_table import write_table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the runs")
    parser.add_argument("--metrics", type=globs, default=["*"], help="comma separated globs of metrics (default: all)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    path, table = write_table(args.folder, args.metrics)
    print(f"{table}\n\nresults: {path}")


if __name__ == "__main__":
    run(main)
