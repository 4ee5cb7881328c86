"""Plots of a pruning run, as PNG files that are whole or not there.

Sparsities are in per cent; a label names a mask of the run, such as "63" or "2:4".
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.reports.measures import level_name
from engine.reports.weight_places import EXPONENTS, place
from sparsity.files import replacing

_TAIL = 1e-4  # share of the smallest weights that histograms leave out
_GAP = "#e8e8e8"  # where a block has no such weight
_MARKS = "osD^vPX"  # of curves, so that they are told apart without colours
_COLUMNS = 2  # of panels, so that their text is read in a page of usual width
_DASHES = ("--", ":", "-.")


def plot_sparsity(
    path: Path,
    layers: Mapping[str, Mapping[str, float]],
    groups: Mapping[str, Mapping[str, float]],
    group_of: Mapping[str, str],
    title: str,
) -> None:
    """The sparsity of every layer and every group.

    layers, groups: for each label, name of a layer (in prunable order) or of a group -> its sparsity. group_of: layer
    -> group.
    """
    figure = _figure(13, 4.5)
    by_layer, by_group = figure.subplots(1, 2, width_ratios=(4, 1))
    names = list(group_of)
    for label, sparsities in layers.items():
        by_layer.plot([sparsities[name] for name in names], ".-", label=level_name(label), linewidth=0.8, markersize=4)
    order = list(dict.fromkeys(group_of.values()))
    for first, name in enumerate(names):
        if first and group_of[name] != group_of[names[first - 1]]:
            by_layer.axvline(first - 0.5, color="grey", linewidth=0.8)
    for group in order:
        places = [i for i, name in enumerate(names) if group_of[name] == group]
        by_layer.text(sum(places) / len(places), 103, group, ha="center", fontsize=9)
    by_layer.set(xlabel="prunable layer, in the model's order", ylabel="sparsity (%)", ylim=(-3, 110))
    by_layer.legend(loc="lower right", fontsize=8)
    by_layer.grid(alpha=0.3)
    width = 0.8 / len(layers)
    for i, sparsities in enumerate(groups.values()):
        heights = [sparsities[group] for group in order]
        by_group.bar([x + i * width for x in range(len(order))], heights, width)
    by_group.set_xticks([x + 0.4 - width / 2 for x in range(len(order))], order)
    by_group.set(ylim=(0, 100), ylabel="sparsity of the group's weights (%)")
    by_group.grid(alpha=0.3, axis="y")
    _save(figure, path, title)


def plot_heat(path: Path, layers: Mapping[str, Mapping[str, float]], group_of: Mapping[str, str], title: str) -> None:
    """The sparsity of every weight matrix: for each label and group a map of blocks (rows) and kinds (columns).

    layers: for each label, layer -> its sparsity. group_of: layer -> group.
    """
    order = list(dict.fromkeys(group_of.values()))
    names = {group: [name for name in group_of if group_of[name] == group] for group in order}
    blocks = {group: list(dict.fromkeys(place(name)[0] for name in names[group])) for group in order}
    kinds = {group: list(dict.fromkeys(place(name)[1] for name in names[group])) for group in order}
    tallest, widths = max(map(len, blocks.values())), [max(4, len(kinds[group])) for group in order]
    panel = max(1.0, 0.2 * tallest)
    figure = _figure(1.2 + sum(0.42 * width + 0.4 for width in widths), 2.2 + (panel + 0.15) * len(layers))
    axes = figure.subplots(len(layers), len(order), width_ratios=widths, squeeze=False)
    for number, (label, sparsities) in enumerate(layers.items()):
        for axis, group in zip(axes[number], order, strict=True):
            cells = np.full((tallest, len(kinds[group])), np.nan)
            for name in names[group]:
                block, kind = place(name)
                cells[blocks[group].index(block), kinds[group].index(kind)] = sparsities[name]
            image = _map(axis, cells, _percent, vmin=0, vmax=100)
            axis.set_facecolor(_GAP)
            axis.axhspan(len(blocks[group]) - 0.5, tallest, color="white")  # below the last block
            axis.set_ylim(tallest - 0.5, -0.5)
            axis.spines[:].set_visible(False)
            prefix = _shared_prefix(blocks[group])
            axis.set_yticks(range(len(blocks[group])), [block.removeprefix(prefix) for block in blocks[group]])
            axis.set_xticks(range(len(kinds[group])), [])
            if not number:
                axis.xaxis.tick_top()
                axis.set_xticks(range(len(kinds[group])), kinds[group], rotation=90)
                axis.set_title(f"{group}\n{prefix}*" if prefix else group, fontsize=8)
        axes[number, 0].set_ylabel(f"{level_name(label)}: block", fontsize=9, fontweight="bold")
    figure.colorbar(image, ax=axes, label="sparsity (%)", fraction=0.03, pad=0.01, aspect=30)
    _save(figure, path, title)


def plot_magnitudes(path: Path, counts: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Histograms of the weights' magnitudes, both axes logarithmic, a panel for each group.

    counts: label -> group -> counts as `engine.reports.weight_places.magnitudes` gives them; the first label is the
    dense model.
    """
    edges = 10 ** np.linspace(*EXPONENTS, len(next(iter(next(iter(counts.values())).values()))) + 1)
    dense = next(iter(counts.values()))
    below = np.cumsum(sum(np.asarray(values) for values in dense.values()))
    low, high = (int(np.searchsorted(below, share * below[-1])) for share in (_TAIL, 1))
    top = max(1.0, *(float(max(values)) for values in dense.values()))
    figure = _figure(1 + 4 * len(dense), 3.8)
    axes = figure.subplots(1, len(dense), sharey=True, squeeze=False)[0]
    for axis, group in zip(axes, dense, strict=True):
        for i, (label, values) in enumerate(counts.items()):
            left = values[group].sum() / max(dense[group].sum(), 1)
            share = f"{level_name(label)}: {100 * left:.1f} % kept" if i else label
            filled = {"fill": True, "color": "lightgrey"} if not i else {"color": f"C{i - 1}", "linewidth": 1.2}
            axis.stairs(np.asarray(values[group]), edges, label=share, **filled)
        axis.set(xlim=edges[[low, high + 1]], ylim=(max(top / 1e6, 0.5), 2 * top), title=group)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("magnitude of the weight")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize=8)
    axes[0].set_ylabel("weights in each bin")
    _save(figure, path, title)


def plot_overlap(
    path: Path, overlaps: Mapping[str, tuple[Sequence[str], np.ndarray, np.ndarray, float]], title: str
) -> None:
    """How far masks agree: intersection over union of kept and of pruned weights.

    overlaps: label -> (names of the masks, (n, n) of the kept, (n, n) of the pruned, share of weights kept).
    """
    most = max(len(names) for names, *_ in overlaps.values())
    side = 1.2 + 0.5 * most
    figure = _figure(2 * side + 1.2, 0.7 + (side + 0.4) * len(overlaps))
    axes = figure.subplots(len(overlaps), 2, squeeze=False)
    for row, (label, (names, kept, pruned, share)) in zip(axes, overlaps.items(), strict=True):
        for axis, what, values, part in zip(row, ("kept", "pruned"), (kept, pruned), (share, 1 - share), strict=True):
            image = _map(axis, values, "{:.2f}".format, vmin=0, vmax=1)
            axis.set_aspect("equal")
            axis.set_xticks(range(len(names)), names, rotation=90)
            axis.set_yticks(range(len(names)), names)
            axis.set_title(f"{level_name(label)}: {what} weights\nby chance {part / (2 - part):.2f}", fontsize=9)
    figure.colorbar(image, ax=axes, label="intersection over union", fraction=0.03, pad=0.02, aspect=30)
    _save(figure, path, title)


def plot_sensitivity(
    path: Path,
    groups: Mapping[str, Mapping[str, Mapping[float, float]]],
    means: Mapping[str, Mapping[float, float]],
    outputs: Mapping[str, Sequence[float]],
    title: str,
) -> None:
    """The error of every layer over its sparsity, a panel for each modality, and what an error does to the output.

    groups: group -> layer -> sparsity -> relative error, both in per cent. means: group -> the same, over its weights.
    outputs: layer -> how far the model's output moves for each unit of error, at each target; may be empty.
    """
    rows = 2 if outputs else 1
    figure = _figure(1 + 4.2 * len(groups), 3.8 * rows)
    axes = figure.subplots(rows, len(groups), sharey="row", squeeze=False)
    for column, (group, curves) in enumerate(groups.items()):
        axis = axes[0, column]
        for number, curve in enumerate(curves.values()):
            shade = 0.85 * number / max(1, len(curves) - 1)  # of grey
            axis.plot(list(curve), list(curve.values()), color=(shade, shade, 1.0), linewidth=0.8)
        axis.plot(list(means[group]), list(means[group].values()), "k--", linewidth=1.8, label="mean over weights")
        axis.set(xlabel="sparsity of the layer (%)", yscale="log", title=group)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=8)
        if outputs:
            places = [i for i, name in enumerate(curves) for _ in outputs[name]]
            axes[1, column].plot(places, [value for name in curves for value in outputs[name]], ".", markersize=5)
            axes[1, column].set(xlabel="prunable layer, in the model's order", yscale="log")
            axes[1, column].grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative squared error of its output (%)\na line for each layer, dark: first, light: last")
    if outputs:
        axes[1, 0].set_ylabel("change of the model's output\nfor each unit of error")
    _save(figure, path, title)


Curve = Sequence[tuple[float, float | None] | None]  # mean and standard error at each level, None where there is none


@dataclass(frozen=True)
class Panel:
    """Curves of quality by level. measure: what they show, with its unit. levels: from left to right. curves: by plan.
    flat: name -> a value at all levels, such as the dense model's. heading: above the panel. across: what levels are.
    """

    measure: str
    levels: Sequence[str]
    curves: Mapping[str, Curve]
    flat: Mapping[str, float]
    heading: str = ""
    across: str = "sparsity, or N:M pattern"


def plot_panels(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Plot curves of quality by level, two panels in a row, with one legend for all.

    A plan has the same colour and mark in all panels.
    """
    names = list(dict.fromkeys(plan for panel in panels for plan in panel.curves))
    flat = list(dict.fromkeys(name for panel in panels for name in panel.flat))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(1 + 5.0 * columns, 0.8 + 3.8 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    lines: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=False):
        for name, value in panel.flat.items():
            style = _DASHES[flat.index(name) % len(_DASHES)]
            lines[name] = axis.axhline(value, color="black", linewidth=1.2, linestyle=style)
        for plan, curve in panel.curves.items():
            found = [(x, *point) for x, point in enumerate(curve) if point is not None]
            places, means, errors = ([values[i] for values in found] for i in range(3))
            number = names.index(plan)
            look = {"color": f"C{number % 10}", "marker": _MARKS[number % len(_MARKS)], "markersize": 5}
            deviation = [error or 0.0 for error in errors]
            lines[plan] = axis.errorbar(places, means, deviation, capsize=2, linewidth=1.4, **look)
        axis.set(xticks=range(len(panel.levels)), xticklabels=panel.levels, title=panel.heading)
        axis.set(xlabel=panel.across, ylabel=panel.measure)
        low, high = axis.get_ylim()
        if 0 < low < high / 2:  # lengths can be compared; else the curves would be flat
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    order = [*flat, *names]
    figure.legend([lines[name] for name in order], order, loc="outside lower center", ncols=min(4, len(order)))
    _save(figure, path, title)


def _figure(width: float, height: float) -> Any:
    """A figure of a size in inches that no window knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _map(axis: Any, values: np.ndarray, write: Any, **limits: float) -> Any:
    """A map with its numbers written into the cells; NaN cells stay empty."""
    image = axis.imshow(values, aspect="auto", cmap="viridis", **limits)
    middle = (limits["vmin"] + limits["vmax"]) / 2
    for (y, x), value in np.ndenumerate(values):
        if not math.isnan(value):
            axis.text(x, y, write(value), ha="center", va="center", fontsize=7, color="wk"[int(value > middle)])
    axis.tick_params(labelsize=7, length=0)
    return image


def _percent(value: float) -> str:
    """Whole per cent, and tenths near the end, so that 100 means that nothing is left."""
    return f"{value:.0f}" if value <= 99 or value == 100 else f"{math.floor(10 * value) / 10:.1f}"


def _shared_prefix(blocks: Sequence[str]) -> str:
    """Return what the names of all the blocks begin with, up to a dot."""
    shared = os.path.commonprefix(blocks).rpartition(".")[0]
    return f"{shared}." if shared else ""
