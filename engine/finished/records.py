"""The table of records, of the runs of scripts/records.sh: the best quality that is known at each level, one-shot and
recovered, beside the dense model and its weights in 8 bits.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.finished.quality_table import MEASURES
from engine.reports.report import DENSE, FACTS, RECOVERED, markdown_table
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

_INT8 = "dense int8"  # the pruner of a row of compare.py --int8
_NONE = "-"


def write_records(folder: Path) -> tuple[Path, str]:
    """Write `folder`/table.md of the runs in `folder`/<model>/<levels>; return its path and the table.

    Raises MissingFileError where there is no run, UserError for one that is damaged.
    """
    rows = [row for path in sorted(folder.glob(f"*/*/*/{FACTS}"), key=_order) for row in _rows(path)]
    if not rows:
        raise MissingFileError(
            f"{folder}/<model>/<levels>/<pruner>/{FACTS}: there is none; scripts/records.sh makes them"
        )
    table = markdown_table(rows)
    write_atomic(folder / "table.md", f"# Records\n\n{table}\n".encode())
    return folder / "table.md", table


def _order(path: Path) -> tuple[str, float]:
    levels = path.parts[-3]
    return path.parts[-4], 0.0 if "of" in levels else float(levels.split(",")[0])


def _rows(path: Path) -> list[dict[str, str]]:
    """Return a row for each level of a run: what it measured, by what plan and command, and what that took.

    The seconds of a level are those of the calibration, which serves all levels of the run, and its masks; then those
    of its recovery.
    """
    folder = path.parent.parent
    command = folder / "command"
    try:
        told = json.loads(path.read_text())
        columns = next(columns[:count] for columns, count in MEASURES if columns[0] in told["measures"])
        rows = {row["sparsity"]: row for row in told["rows"]}
        found = []
        for level in [label for label in rows if label != DENSE and not label.endswith(RECOVERED)]:
            pruned, recovered = rows[level], rows.get(f"{level}{RECOVERED}")
            seconds = [float(row["seconds"]) for row in (pruned, recovered) if row]
            seconds[0] += float(told["facts"]["calibration"].split()[0])
            found.append(
                {
                    "model": folder.parent.name,
                    "level": level if ":" in level else f"{level} %",
                    "measure": " / ".join(columns),
                    "one-shot": _values(pruned, columns),
                    "recovered": _values(recovered, columns),
                    "dense": _values(rows.get(DENSE), columns),
                    "dense int8": _int8(folder.parent / "int8" / "results.csv", columns),
                    "plan": told["facts"].get("preset", path.parent.name),
                    "seconds": " + ".join(f"{value:.0f}" for value in seconds),
                    "command": f"`{command.read_text().strip()}`" if command.is_file() else _NONE,
                }
            )
    except (ValueError, KeyError, StopIteration, AttributeError):
        found = []
    if not found:
        raise UserError(f"{path}: not what prune.py --evaluate writes; delete it, and run that again")
    return found


def _values(row: Mapping[str, Any] | None, columns: Sequence[str]) -> str:
    return " / ".join(f"{row[column]:.1f}" for column in columns) if row else _NONE


def _int8(path: Path, columns: Sequence[str]) -> str:
    if not path.is_file():
        return _NONE
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["pruner"] == _INT8]
    return " / ".join(f"{float(rows[-1][column]):.1f}" for column in columns) if rows else _NONE
