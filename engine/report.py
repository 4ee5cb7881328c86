"""What a pruning run tells its reader: tables as Markdown and text, plots of sparsity, a CSV of run times."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files import replacing, write_atomic


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
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, text.getvalue().encode())
    finally:
        os.close(handle)


def plot_sparsity(path: Path, layers: Mapping[str, Mapping[str, float]], groups: Mapping[str, str], title: str) -> None:
    """PNG with the sparsity of every layer and every group.

    layers: for each mask its label -> (layer name -> sparsity in per cent), in prunable order. groups: layer -> group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_layer, by_group = figure.subplots(1, 2, width_ratios=(4, 1))
    names = list(groups)
    for label, sparsities in layers.items():
        by_layer.plot([sparsities[name] for name in names], ".-", label=label, linewidth=0.8, markersize=4)
    order = list(dict.fromkeys(groups.values()))
    for first, name in enumerate(names):
        if first and groups[name] != groups[names[first - 1]]:
            by_layer.axvline(first - 0.5, color="grey", linewidth=0.8)
    for group in order:
        places = [i for i, name in enumerate(names) if groups[name] == group]
        by_layer.text(sum(places) / len(places), 103, group, ha="center", fontsize=9)
    by_layer.set(xlabel="prunable layer, in the model's order", ylabel="sparsity (%)", ylim=(-3, 110))
    by_layer.legend(loc="lower right", fontsize=8)
    by_layer.grid(alpha=0.3)
    width = 0.8 / len(layers)
    for i, (label, sparsities) in enumerate(layers.items()):
        heights = [_mean([sparsities[n] for n in names if groups[n] == group]) for group in order]
        by_group.bar([x + i * width for x in range(len(order))], heights, width, label=label)
    by_group.set_xticks([x + 0.4 - width / 2 for x in range(len(order))], order)
    by_group.set(ylim=(0, 100), ylabel="mean sparsity of the group's layers (%)")
    by_group.grid(alpha=0.3, axis="y")
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    plot: str,
    layers: Sequence[Mapping[str, Any]],
) -> None:
    """`report.md`: how the run was made, the table of results, warnings, the plot and the layers."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", markdown_table(rows), ""]
    lines += ["## Warnings", "", *(f"- {line}" for line in warnings), ""] if warnings else []
    heading = "## Sparsity per layer and group"
    lines += [heading, "", f"![sparsity per layer and group]({plot})", "", markdown_table(layers), ""]
    write_atomic(path, "\n".join(lines).encode())
