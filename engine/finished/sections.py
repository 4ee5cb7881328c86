"""Sections of the page of finished pruning runs that compare them: what is left of the quality, what captions find, and
which layers are sensitive.
"""

import csv
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.finished.markdown import anchor, image, table, to_html
from engine.reports.measures import axis_name, level_name, lower_is_better, meanings
from engine.reports.plots import Panel, plot_panels
from engine.reports.report import DENSE, RECOVERED, markdown_table

_FIRST = "R@1"  # of the measures of retrieval, those that are drawn; of others the first
_SHOWN = 5  # layers at either end of the ranking by sensitivity


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what `engine.reports.report.FACTS` of it has."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of its folder, which is the pruner's."""
        return self.folder.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of its table, the dense model first where it was evaluated."""
        return self.told["rows"]

    @property
    def pruned(self) -> list[dict[str, Any]]:
        """Return the rows without the dense model."""
        return [row for row in self.rows if row["sparsity"] != DENSE]


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, and its content as HTML."""

    heading: str
    content: str

    @property
    def id(self) -> str:
        """Return what links to it name."""
        return anchor(self.heading)


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections that compare runs, those for which there is something to show, the summary first."""
    makers = (_summary, _curves, _retrieved, _sensitive, _numbers)
    return [section for make in makers for section in make(runs)]


def together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the rows of all runs, the dense model once; "-" where a run has no such column."""
    columns = list(dict.fromkeys(column for run in runs for row in run.rows for column in row))
    first = [("-", row) for row in runs[0].rows if row["sparsity"] == DENSE]
    rows = [*first, *((run.name, row) for run in runs for row in run.pruned)]
    return [{"pruner": name} | {column: row.get(column, "-") for column in columns} for name, row in rows]


def _summary(runs: Sequence[Run]) -> Iterator[Section]:
    """Yield what was pruned, and what is left, from the best run to the worst at each level."""
    facts = runs[0].told.get("facts", {})
    known = [f"{key}: {facts[key]}" for key in ("weights", "prunable weights", "calibration data") if key in facts]
    what = (
        "Pruning sets weights to zero; the sparsity is the share of the prunable weights that are zero. A pruner says"
        " which weights these are; some pruners (solvers) also update the weights that are kept. Only rows that are"
        " called “recovered” were trained afterwards."
    )
    known.insert(0, f"runs: {'; '.join(run.told['title'] for run in runs)}")
    parts = [f"<p>{what}</p>", f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in known)}</ul>"]
    if measures := _drawn(runs):
        parts.append("<p>Quality that is left, the best first at each sparsity; bars: of the dense model's.</p>")
        parts.append(_left(runs, measures))
    yield Section("Summary", "".join(parts))


def _left(runs: Sequence[Run], measures: Sequence[str]) -> str:
    dense = _dense(runs)
    rows = [(run.name, row) for run in runs for row in run.pruned if measures[0] in row]
    sign = 1 if lower_is_better(measures[0]) else -1
    levels = _levels(runs)
    rows.sort(key=lambda found: (levels.index(found[1]["sparsity"]), sign * found[1][measures[0]]))
    body = [["dense", "dense", *(_bar(dense[name], dense[name]) for name in measures)]] if dense else []
    for name, row in rows:
        cells = [_bar(row[measure], None if lower_is_better(measure) else dense.get(measure)) for measure in measures]
        body.append([html.escape(level_name(row["sparsity"])), html.escape(name), *cells])
    return table(["sparsity", "pruner", *map(axis_name, measures)], body, "left")


def _bar(value: float, whole: float | None) -> str:
    """Return a cell with a number, a bar of its share of the dense model's, and that share in per cent."""
    if not whole:
        return f"{value:.1f}"
    share = 100 * value / whole
    return f"{_length(f'{value:.1f}', share)} <small>{share:.0f} %</small>"


def _length(number: str, share: float) -> str:
    """Return a number and a bar of a length in per cent."""
    bar = f'<span class="bar"><i style="width: {min(100.0, max(0.0, share)):.0f}%"></i></span>'
    return f'<span class="number">{number}</span> {bar}'


def _numbers(runs: Sequence[Run]) -> Iterator[Section]:
    """Yield the table of all numbers, and what its columns mean."""
    measures = list(dict.fromkeys(measure for run in runs for measure in run.told["measures"]))
    rows = together(runs)
    modalities = [name.removesuffix(" %") for name in rows[0] if name.endswith(" %") and name not in measures]
    items = meanings([name for name in rows[0] if name in measures], modalities).items()
    legend = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(what)}</dd>" for name, what in items)
    yield Section("All numbers", f"{to_html(markdown_table(rows), runs[0].folder)}<dl>{legend}</dl>")


def _dense(runs: Sequence[Run]) -> dict[str, float]:
    """Return measure -> value of the dense model, of the first run that has measured it."""
    found: dict[str, float] = {}
    for run in runs:
        for row in run.rows[:1]:
            values = {name: row[name] for name in run.told["measures"] if name in row and row["sparsity"] == DENSE}
            found = values | found
    return found


def _drawn(runs: Sequence[Run]) -> list[str]:
    """Return the measures that stand for the quality, none where nothing was evaluated."""
    there = {column for run in runs for row in run.pruned for column in row}
    measures = [name for run in runs for name in run.told["measures"] if name in there]
    return list(dict.fromkeys(name for name in measures if name.endswith(_FIRST))) or measures[:1]


def _levels(runs: Sequence[Run]) -> list[str]:
    """Return the labels of all masks: rising sparsities, each before its recovered one, then patterns."""

    def order(label: str) -> tuple[bool, float, str]:
        return ":" in label, float(label.split(":")[0].split()[0]), label

    return sorted({row["sparsity"] for run in runs for row in run.pruned}, key=order)


def _curves(runs: Sequence[Run]) -> Iterator[Section]:
    """Yield the picture of quality by sparsity, where it was measured; recovered models have a curve of their own."""
    levels = list(dict.fromkeys(label.removesuffix(RECOVERED) for label in _levels(runs)))
    dense, panels = _dense(runs), []
    for measure in _drawn(runs):
        curves = {}
        for run in runs:
            values = {row["sparsity"]: row[measure] for row in run.pruned if measure in row}
            for more in ("", RECOVERED):
                curve = [(values[level + more], None) if level + more in values else None for level in levels]
                curves |= {run.name + more: curve} if any(curve) else {}
        flat = {DENSE: dense[measure]} if measure in dense else {}
        panels.append(Panel(axis_name(measure), [level_name(level) for level in levels], curves, flat))
    if not panels:
        return
    with TemporaryDirectory() as folder:
        plot_panels(path := Path(folder, "curves.png"), panels, "")
        told = ", ".join(name for name in panels[0].curves)
        drawn = image(path, f"curves of {' and '.join(panel.measure for panel in panels)} over sparsity: {told}")
    what = "One curve for each pruner. The nearer to the dashed line, the dense model, the less quality is lost."
    yield Section("Quality by sparsity", f"<p>{what}</p>{drawn}")


def _retrieved(runs: Sequence[Run]) -> Iterator[Section]:
    """Yield the table of captions and what the dense and the pruned models find for them."""
    runs = [run for run in runs if run.told["retrieved"]]
    if not runs:
        return
    shown = runs[0].told["retrieved"]
    runs = [run for run in runs if run.told["retrieved"]["captions"] == shown["captions"]]
    columns = [(DENSE, shown, shown["found"][DENSE])] if DENSE in shown["found"] else []
    for run in runs:
        found = run.told["retrieved"]
        for label, numbers in found["found"].items():
            columns += [(f"{run.name} {level_name(label)}", found, numbers)] if label != DENSE else []
    columns = [(f"{name}: {_hits(numbers, shown['right'])} right", found, numbers) for name, found, numbers in columns]
    rows = []
    for i, (caption, right) in enumerate(zip(shown["captions"], shown["right"], strict=True)):
        own = [html.escape(caption), _picture(shown, right, None)]
        rows.append(own + [_picture(found, numbers[i], right) for _, found, numbers in columns])
    what = (
        "The picture that each model ranks first for a caption (text-to-image retrieval), among all pictures of the"
        f" evaluation, for its first {len(rows)} captions. Green and ✓: the picture that belongs to the caption; red"
        " and ✗: another one, though it may look alike."
    )
    head = ("caption (query)", "its picture", *(name for name, _, _ in columns))
    yield Section("Retrieved pictures", f"<p>{what}</p>{table(head, rows, 'found')}")


def _hits(numbers: Sequence[int], right: Sequence[int]) -> str:
    return f"{sum(one == other for one, other in zip(numbers, right, strict=True))} of {len(right)}"


def _picture(told: Mapping[str, Any], number: int, right: int | None) -> str:
    """Return a picture by its number; `right` is that of the caption, None where it is itself shown."""
    source = told["pictures"].get(str(number))
    if not source:
        return "unreadable"
    if right is None:
        return f'<img src="{source}" alt="picture {number}, of the caption">'
    kind, sign = ("right", "✓") if number == right else ("wrong", "✗")
    return f'<img src="{source}" alt="picture {number}, {kind}" class="{kind}"><br>{sign}'


def _sensitive(runs: Sequence[Run]) -> Iterator[Section]:
    """Yield the layers that lose most and least, of the runs that have measured it."""
    parts = [part for run in runs if (run.folder / "sensitivity.csv").is_file() for part in _ranking(run)]
    if not parts:
        return
    what = (
        "How much a layer suffers when it is pruned on the inputs of the dense model: the squared error of its output,"
        " relative to the squared size of that output, in per cent (0: nothing is lost, 100: as bad as an output of"
        " zero). An allocation that knows this prunes sensitive layers less, and the others more."
    )
    yield Section("Sensitivity of layers", f"<p>{what}</p>{''.join(parts)}")


def _ranking(run: Run) -> Iterator[str]:
    """Yield the table of one run: the layers with the largest and the smallest error at its highest sparsity."""
    target = max(float(row["all %"]) for row in run.pruned) / 100
    with (run.folder / "sensitivity.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["relative_error"]]
    if not rows:
        return
    near = min((float(row["sparsity"]) for row in rows), key=lambda level: abs(level - target))
    rows = sorted(
        (row for row in rows if float(row["sparsity"]) == near), key=lambda row: -float(row["relative_error"])
    )
    most = float(rows[0]["relative_error"]) or 1.0
    ends = rows if len(rows) <= 2 * _SHOWN else rows[:_SHOWN] + rows[-_SHOWN:]
    body = []
    for row in ends:
        error = float(row["relative_error"])
        names = [html.escape(row["layer"]), html.escape(row["group"]), f"{int(row['weights']):,}"]
        body.append([*names, _length(f"{100 * error:.3g}", 100 * error / most)])
    if len(rows) > len(ends):
        body.insert(_SHOWN, [f"… {len(rows) - len(ends)} layers between", "", "", ""])
    percent = f"{100 * near:.3g} %"
    where = anchor(run.name, "Sensitivity of layers and modalities")
    yield (
        f"<p>The most and the least sensitive layers when {html.escape(run.name)} prunes each of them to {percent}"
        f' (<a href="#{where}">all layers, at all sparsities</a>):</p>'
    )
    yield table(["layer", "modality", "weights", f"error of its output at {percent} (%)"], body, "left")
