"""Report on single layers: their sensitivity, as an allocation has measured it (a table, a plot and a CSV
file), and how well their outputs are kept.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.reports.plots import plot_sensitivity
from engine.reports.report import Picture, markdown_table
from sparsity.files import write_atomic
from sparsity.sensitivity.measured import Sensitivity
from sparsity.view import PrunableView

_COLUMNS = range(10, 100, 10)  # sparsities in per cent, at which the table has errors
_WHAT = (
    "Relative squared error of a layer's output, in per cent, when the layer is pruned by the run's method to the"
    " sparsity of the column, on the inputs of the dense model (linear between what was measured); of a modality, the"
    " mean over its weights."
)
_OUTPUT = (
    "Output: by how much the model's output moves (squared, relative) for each unit of that error, when the layer alone"
    " is pruned to the run's sparsity (of several, in their order)."
)


def report_sensitivity(folder: Path, view: PrunableView, found: Sensitivity, title: str) -> list[Picture]:
    """Write `sensitivity.png` and `sensitivity.csv`; return the section of the report, none where nothing is known."""
    if not found.errors:
        return []
    curves = {name: {100 * float(s): 100 * e for s, e in curve.items()} for name, curve in found.errors.items()}
    groups = {group: {name: curves[name] for name in names} for group, names in view.groups.items()}
    means = {group: _mean(view, own) for group, own in groups.items()}
    outputs = {name: list(curve.values()) for name, curve in found.outputs.items()}
    plot_sensitivity(folder / "sensitivity.png", groups, means, outputs, title)
    _write_csv(folder / "sensitivity.csv", view, found)
    sizes = {group: sum(view.weights[name].numel for name in own) for group, own in groups.items()}
    rows = [_row(f"all of {group}", group, sizes[group], mean) for group, mean in means.items()]
    rows += [_row(name, weight.group, weight.numel, curves[name]) for name, weight in view.weights.items()]
    used = [f"{column} %" for column in _COLUMNS if any(row[f"{column} %"] for row in rows)]
    for row in rows:
        told = " / ".join(f"{value:.3g}" for value in outputs.get(row["layer"], ()))
        row |= {"output": told} if outputs else {}
    shown = ("layer", "group", "weights", *used, *(["output"] if outputs else []))
    notes = [_WHAT, *([_OUTPUT] if outputs else []), markdown_table([{key: row[key] for key in shown} for row in rows])]
    return [Picture("Sensitivity of layers and modalities", "sensitivity.png", notes)]


def _mean(view: PrunableView, curves: Mapping[str, Mapping[float, float]]) -> dict[float, float]:
    """Return the mean curve of some layers, weighted by size, where all of them were measured."""
    first, last = max(min(curve) for curve in curves.values()), min(max(curve) for curve in curves.values())
    grid = sorted({s for curve in curves.values() for s in curve if first <= s <= last})
    sizes = [view.weights[name].numel for name in curves]
    return {s: float(np.average([_at(curve, s) for curve in curves.values()], weights=sizes)) for s in grid}


def _at(curve: Mapping[float, float], sparsity: float) -> float:
    return float(np.interp(sparsity, list(curve), list(curve.values())))


def _row(layer: str, group: str, numel: int, curve: Mapping[float, float]) -> dict[str, Any]:
    within = {column: bool(curve) and min(curve) <= column <= max(curve) for column in _COLUMNS}
    errors = {f"{c} %": f"{_at(curve, c):.3g}" if within[c] else "" for c in _COLUMNS}
    return {"layer": layer, "group": group, "weights": numel, **errors}


def _write_csv(path: Path, view: PrunableView, found: Sensitivity) -> None:
    """Write every number that was measured: a row for each layer and sparsity."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layer", "group", "weights", "sparsity", "relative_error", "output_per_error"))
    for name, weight in view.weights.items():
        errors, outputs = found.errors[name], found.outputs.get(name, {})
        points: Sequence[Any] = sorted({*errors, *outputs})
        writer.writerows(
            (name, weight.group, weight.numel, float(s), errors.get(s, ""), outputs.get(s, "")) for s in points
        )
    write_atomic(path, text.getvalue().encode())


# Of `sparsity.reconstruction.errors.Errors`, in its order.
_ERRORS = ("before", "after", "held out before", "held out after")


def error_rows(errors: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, str]]:
    """Return the rows of a table, the layer with the largest error after the update first.

    errors: name of a target -> name of a layer -> relative squared errors as `_ERRORS` has them, NaN where one was not
    measured. In per cent.
    """
    names = list(dict.fromkeys(name for found in errors.values() for name in found))
    worst = {name: max((found[name][1] for found in errors.values() if name in found), default=0.0) for name in names}
    shown = [
        (label, i)
        for label, found in errors.items()
        for i in range(len(_ERRORS))
        if any(not math.isnan(values[i]) for values in found.values())
    ]
    return [
        {"layer": name} | {f"{label}: {_ERRORS[i]} %": _percent(errors[label].get(name, ()), i) for label, i in shown}
        for name in sorted(names, key=lambda name: -worst[name])
    ]


def _percent(values: Sequence[float], place: int) -> str:
    return f"{100 * values[place]:.3g}" if place < len(values) and not math.isnan(values[place]) else "-"
