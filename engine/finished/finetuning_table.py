"""The metrics of many fine-tuned models beside each other: what pruning costs each task."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from engine.reports.report import markdown_table
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

DENSE = "dense"
METRICS = "result/metrics.json"
ABSENT = "-"


def read_metrics(folder: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Read the finished metrics in <folder>/<run>/<level>/result/metrics.json: run -> level -> test -> metric -> value.

    A level is "dense" or a sparsity in per cent. Raises FileNotFoundError where nothing is, UserError naming a file
    that does not hold metrics or is in a folder of another name.
    """
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for path in sorted(folder.glob(f"*/*/{METRICS}")):
        run, level = path.relative_to(folder).parts[:2]
        if level != DENSE and not _is_number(level):
            raise UserError(f"{path}: expected <run>/dense or <run>/<sparsity> in {folder}, got {run}/{level}")
        try:
            metrics = json.loads(path.read_bytes())
            tests = {str(test): {str(k): float(v) for k, v in values.items()} for test, values in metrics.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the metrics of tests ({error}); train it again") from None
        found.setdefault(run, {})[level] = tests
    if not found:
        raise MissingFileError(f"{folder}/<run>/<dense or sparsity>/{METRICS}: there is none; fine-tune first")
    return found


def table(folder: Path, wanted: Sequence[str] = ("*",)) -> str:
    """Markdown: a row for each run, test and metric, a column for the dense model and each sparsity.

    wanted: globs of metrics. Raises FileNotFoundError or UserError as `read_metrics`, and UserError where none of
    the runs has such a metric.
    """
    found = read_metrics(folder)
    levels = sorted({level for tuned in found.values() for level in tuned}, key=_order)
    rows = []
    for run, tuned in found.items():
        named = {(test, metric): None for tests in tuned.values() for test, own in tests.items() for metric in own}
        for test, metric in named:
            if any(fnmatchcase(metric, glob) for glob in wanted):
                row: dict[str, Any] = {"task": run, "test": test, "metric": metric}
                values = {level: tuned.get(level, {}).get(test, {}).get(metric, ABSENT) for level in levels}
                rows.append(row | {level if level == DENSE else f"{level} %": value for level, value in values.items()})
    if not rows:
        raise UserError(f"{folder}: no run has the metric {' or '.join(wanted)}")
    return markdown_table(rows)


def write_table(folder: Path, wanted: Sequence[str] = ("*",)) -> tuple[Path, str]:
    """`table` in <folder>/table.md; returns the path and the table."""
    text, path = table(folder, wanted), folder / "table.md"
    what = "What fine-tuning makes of the dense model and of the pruned ones, by sparsity."
    write_atomic(path, f"# Fine-tuned models\n\n{what}\n\n{text}\n".encode())
    return path, text


def ways_table(folder: Path) -> str:
    """Markdown: a row for each data, way of training, test and metric in
    <folder>/runs/<data>/<way>/<seed>/result/metrics.json, with the mean over the seeds and its standard error.

    Raises MissingFileError where nothing is finished.
    """
    values: dict[tuple[str, ...], list[float]] = {}
    for path in sorted(folder.glob(f"runs/*/*/*/{METRICS}")):
        data, way, _ = path.relative_to(folder / "runs").parts[:3]
        for test, own in json.loads(path.read_bytes()).items():
            for metric, value in own.items():
                values.setdefault((data, way, test, metric), []).append(float(value))
    if not values:
        raise MissingFileError(f"{folder}/runs/<data>/<way>/<seed>/{METRICS}: there is none; fine-tune first")
    rows = []
    for (data, way, test, metric), found in values.items():
        row: dict[str, Any] = {"data": data, "way": way, "test": test, "metric": metric, "mean": fmean(found)}
        error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else ABSENT
        rows.append(row | {"standard error": error, "seeds": len(found)})
    return markdown_table(rows)


def write_ways(folder: Path) -> tuple[Path, str]:
    """`ways_table` in <folder>/table.md; returns the path and the table."""
    text, path = ways_table(folder), folder / "table.md"
    write_atomic(path, f"# Sparse training on one's own data\n\n{text}\n".encode())
    return path, text


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def _order(level: str) -> float:
    return -1.0 if level == DENSE else float(level)
