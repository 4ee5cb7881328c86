"""The table of scripts/tradeoff.sh: what is left of a model's quality beside what pruning and int8 save of its bytes
and its time.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.finished.quality_table import MEASURES
from engine.reports.report import markdown_table, mean_and_error, with_error
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

SPEED = "speed.csv"  # of benchmark.py
DENSE, PACKED, FAST = "dense", "packed", "accelerated"  # variants of benchmark.py
INT8, PRUNED_INT8 = "ONNX int8 dense", "ONNX int8 pruned"
NAMES = {  # variant -> how it is stored, and how it runs
    DENSE: ("float32", "dense layers"),
    INT8: ("int8", "ONNX Runtime"),
    FAST: ("packed", "sparse kernels where they are faster"),
    PRUNED_INT8: ("int8, zeros kept", "ONNX Runtime"),
}
WHAT = """Quality in per cent, without training; bytes as a share of those of the dense model; and how many times as
fast as the dense model a batch of 1 and of 8 is: mean ± standard error over runs, one for each seed (of dense models,
which draw nothing, one for each run). Times are medians of rounds in which all variants of a run take turns. A packed
file holds float32 without zeros, and is unpacked, or given to sparse kernels, when it is loaded; an int8 file is ONNX,
has a scale for each output channel, and stores zeros like other numbers.
"""

Row = Mapping[str, str]


@dataclass
class _Line:
    """One line of the table. bytes: share of the dense model's. times: batch -> of each run."""

    quality: list[tuple[float, ...]] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class _Model:
    """Hold the results of a model. lines: (level, variant) -> line, the level of dense models is ""."""

    name: str
    columns: tuple[str, ...]
    lines: dict[tuple[str, str], _Line] = field(default_factory=dict)

    def add(self, level: str, rows: Sequence[Row]) -> None:
        """Take in the rows of a run."""
        known = {(row["variant"], row["batch"]): row for row in rows}
        for (variant, batch), row in known.items():
            if variant not in NAMES:
                continue
            line = self.lines.setdefault(("" if variant in (DENSE, INT8) else level, variant), _Line())
            dense, stored = known[DENSE, batch], known[PACKED, batch] if variant == FAST else row
            line.times.setdefault(batch, []).append(float(dense["ms"]) / float(row["ms"]))
            if (variant, batch) == next(key for key in known if key[0] == variant):  # the same for each batch
                line.quality.append(tuple(float(row[column]) for column in self.columns))
                line.bytes.append(float(stored["MB on disk"]) / float(dense["MB on disk"]))

    def rows(self, batches: Iterable[str]) -> list[dict[str, str]]:
        """Return the lines of the table, dense ones first, then by level."""
        found = []
        for level, variant in sorted(self.lines, key=lambda key: (_order(key[0]), list(NAMES).index(key[1]))):
            line = self.lines[level, variant]
            quality = [with_error(*_mean(values), digits=1) for values in zip(*line.quality, strict=True)]
            row = dict(
                zip(("model", "zeros", "stored", "run by"), (self.name, level or "-", *NAMES[variant]), strict=True)
            )
            row |= {"measure": " / ".join(self.columns), "quality": " / ".join(quality)}
            row |= {"bytes": with_error(*_mean(line.bytes), digits=3)}
            for batch in batches:
                times = line.times.get(batch)
                row[f"batch {batch}"] = with_error(*_mean(times), digits=2) if times else "-"
            found.append(row | {"runs": str(len(line.quality))})
        return found


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard error, without the latter where there is none."""
    mean, error = mean_and_error(values)
    return mean, error or None


def _order(level: str) -> tuple[int, str, str]:
    """Dense models, sparsities, blocks, N:M."""
    pattern, _, share = level.rpartition(" ")
    return (0 if not level else 3 if ":" in level else 2 if pattern.startswith("block") else 1), pattern, share


def write_tradeoff(folder: Path) -> tuple[Path, str]:
    """Write `folder`/table.md of the runs in `folder`/<model>/<level>/<seed>; return its path and the table.

    Raises MissingFileError where there is no run, UserError for one that is damaged.
    """
    models: dict[str, _Model] = {}
    paths = sorted(folder.glob(f"*/*/*/{SPEED}"))
    if not paths:
        raise MissingFileError(
            f"{folder}/<model>/<level>/<seed>/{SPEED}: there is none; scripts/tradeoff.sh makes them"
        )
    for path in paths:
        name, level = path.parts[-4:-2]
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            columns = next(columns for columns, _ in MEASURES if {*columns} <= rows[0].keys())
            models.setdefault(name, _Model(name, columns)).add(level_of(level), rows)
        except (ValueError, KeyError, IndexError, StopIteration, ZeroDivisionError):
            raise UserError(f"{path}: not what benchmark.py --evaluate writes; delete it, and run that again") from None
    batches = sorted(
        {batch for model in models.values() for line in model.lines.values() for batch in line.times}, key=int
    )
    table = markdown_table([row for model in models.values() for row in model.rows(batches)])
    write_atomic(folder / "table.md", f"# Quality, bytes and time\n\n{WHAT}\n{table}\n".encode())
    return folder / "table.md", table


def level_of(folder: str) -> str:
    """Return the level that a folder of runs is named after: "2of4" is 2:4, "block4x4_75" blocks at 75 %."""
    if "of" in folder:
        return folder.replace("of", ":")
    return f"{folder.replace('_', ' ')} %"
