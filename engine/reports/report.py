"""Report of a pruning run: tables as Markdown and text, pictures, a CSV of run times."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity.files import append, write_atomic

Metrics = Mapping[str, float]
DENSE = "dense"  # the label of the model before pruning
RECOVERED = " recovered"  # at the end of the label of masks whose kept weights were trained
FACTS = "report.json"  # what engine.finished.page reads of a run
ERRORS = (
    "Squared error of a layer's output over the size of that output, on the inputs that it had in calibration: with the"
    " mask alone, and with the updated weights. Held out: on a tenth of the samples, by least squares on the others."
)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table whose columns also line up as plain text."""
    header = list(rows[0])
    cells = [header, *([_cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [cells[0], rule, *cells[1:]]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cell(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and its standard error: the sample's standard deviation / sqrt(n), None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def with_error(mean: float, error: float | None, digits: int, sign: str = " ± ") -> str:
    """Return a mean as tables have it, with its standard error where there is one."""
    return f"{mean:.{digits}f}" + ("" if error is None else f"{sign}{error:.{digits}f}")


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV in one write, so that runs that share a folder do not cut into each other's lines.

    A file with other columns is renamed to `<name>_old.csv`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    header = text.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        with path.open(newline="") as file:
            known = file.readline()
        if known == header:
            text.truncate(text.seek(0))
        elif known:
            path.replace(path.with_stem(f"{path.stem}_old"))
    writer.writerows(rows)
    append(path, text.getvalue())


@dataclass(frozen=True)
class Picture:
    """A section of a report: an image file beside it ("" for none), and what there is to say of it."""

    heading: str
    file: str
    notes: Sequence[str] = ()


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    pictures: Sequence[Picture],
    layers: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]] = (),
) -> None:
    """`report.md`: how the run was made, the table of results, warnings, the pictures, the layers, and where their
    weights were updated their errors.
    """
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", markdown_table(rows), ""]
    lines += ["## Warnings", "", *(f"- {line}" for line in warnings), ""] if warnings else []
    for picture in pictures:
        parts = (*picture.notes, *([f"![{picture.heading}]({picture.file})"] if picture.file else []))
        lines += [f"## {picture.heading}", "", *(line for part in parts for line in (part, ""))]
    lines += ["## Layers", "", markdown_table(layers), ""]
    lines += ["## Errors of layers", "", ERRORS, "", markdown_table(errors), ""] if errors else []
    write_atomic(path, "\n".join(lines).encode())
