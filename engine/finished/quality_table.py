"""The comparisons of scripts/quality.sh beside each other: what each plan leaves at each level, which plan is the best,
and whether it is ahead of cheaper ones by more than two standard errors.

A study is a model, and what of it is pruned; a level is a sparsity in per cent, or an N:M pattern.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.reports.measures import axis_name, level_name, lower_is_better
from engine.reports.plots import Panel, plot_panels
from engine.reports.report import markdown_table, mean_and_error, with_error
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

DENSE = ("dense", "dense int8")  # rows that prune nothing, as engine.pruning.comparison names them
ANY_SEED = "-"
PICTURE = "quality.png"  # the first measure of all studies, in a panel each
ERRORS = 2.0  # standard errors by which a plan has to be ahead
COSTS = ("calibration_seconds", "selection_seconds", "peak_mb")
COLUMNS = ("config", "date", "pruner", "sparsity", "seed", *COSTS)
# Columns of a model's results that are shown, and how many of them decide (their mean).
MEASURES = ((("top-1",), 1), (("i2t R@1", "t2i R@1"), 2), (("Frechet", "as asked %"), 1))
WHAT = f"""Quality without training, in per cent (Frechet: a distance, lower is better): mean ± standard error over
seeds, which does not contain what other test images would change. Seconds (statistics and masks, without evaluation)
are the mean of one level and seed; MB is the highest peak of memory, of the process or, on a GPU, of tensors. "dense
int8" rounds the prunable weights to 8 bits by output channel: weights alone, simulated. "best" has the best mean;
"take" is the cheapest plan that the best is not ahead of by more than {ERRORS:.0f} standard errors of their difference,
paired over seeds."""

Row = Mapping[str, str]


@dataclass
class Plan:
    """One plan of a study. values: level -> seed -> (a value for each column that is shown)."""

    name: str
    values: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def add(self, row: Row, columns: Sequence[str]) -> None:
        """Take in a row of results."""
        self.values.setdefault(row["sparsity"], {})[row["seed"]] = tuple(float(row[column]) for column in columns)
        self.seconds.append(float(row["calibration_seconds"]) + float(row["selection_seconds"]))
        self.peaks.append(float(row["peak_mb"]))

    def summary(self, level: str) -> list[tuple[float, float | None]]:
        """Return mean and standard error over seeds of each column."""
        return [mean_and_error(values) for values in zip(*self.values[level].values(), strict=True)]

    def deciding(self, level: str, count: int) -> dict[str, float]:
        """Return seed -> mean of the first `count` columns."""
        return {seed: statistics.fmean(values[:count]) for seed, values in self.values[level].items()}


@dataclass
class Study:
    """The plans of one study, and the dense models."""

    name: str
    columns: tuple[str, ...]
    count: int
    best: Any  # max or min
    plans: list[Plan]
    dense: list[Plan]
    rows: Sequence[Row]

    @property
    def levels(self) -> list[str]:
        """Return the levels: patterns, then rising sparsities."""
        return sorted({level for plan in self.plans for level in plan.values}, key=_order)


def _order(level: str) -> tuple[bool, float, str]:
    return (False, 0.0, level) if ":" in level else (True, float(level), level)


def read_studies(folder: Path) -> list[Study]:
    """Return the studies of <folder>/<study>/<plan>/results.csv, of each plan the rows of its latest configuration.

    Raises FileNotFoundError where nothing is, UserError naming a file that is none of these.
    """
    rows: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*/*/results.csv")):
        rows.setdefault(path.parent.parent.name, []).extend(_read(path))
    if not rows:
        raise MissingFileError(f"{folder}/<study>/<plan>/results.csv: there is none; scripts/quality.sh makes them")
    return [_study(name, found) for name, found in rows.items()]


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a last line may be cut
    if not rows or not {*COLUMNS} <= rows[0].keys():
        raise UserError(f"{path}: not the results of a comparison; delete it, and run scripts/quality.sh again")
    latest = {row["pruner"]: row["config"] for row in rows}
    return [row for row in rows if row["config"] == latest[row["pruner"]]]


def _study(name: str, rows: Sequence[Row]) -> Study:
    known = [measure for measure in MEASURES if {*measure[0]} <= rows[0].keys()]
    if not known:
        raise UserError(f"study {name!r}: has none of the columns {', '.join(m[0][0] for m in MEASURES)}")
    columns, count = known[0]
    best = min if lower_is_better(columns[0]) else max
    plans: dict[str, Plan] = {}
    for row in rows:
        plans.setdefault(_plan(row), Plan(_plan(row))).add(row, columns)
    dense = [plans.pop(name) for name in DENSE if name in plans]
    return Study(name, columns, count, best, list(plans.values()), dense, rows)


def _plan(row: Row) -> str:
    """The plan of a row: "alps 2:4" is alps at 2:4."""
    return row["pruner"].removesuffix(f" {row['sparsity']}")


def difference(better: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """Return the mean difference of two plans at a level, and its standard error, paired over the seeds that both have;
    a plan that draws nothing has its one value under all of them. One pair: 0; none: infinite.
    """
    seeds = [seed for seed in better if seed in other]
    if ANY_SEED in better or ANY_SEED in other:
        seeds = [*better] if ANY_SEED in other else [*other]
    apart = [better.get(seed, better.get(ANY_SEED, 0.0)) - other.get(seed, other.get(ANY_SEED, 0.0)) for seed in seeds]
    if not apart:
        return statistics.fmean(better.values()) - statistics.fmean(other.values()), math.inf
    mean, error = mean_and_error(apart)
    return mean, error or 0.0


def verdict(study: Study, level: str) -> dict[str, str]:
    """Return what to take at a level: the best plan, or the cheapest that it is not clearly ahead of."""
    values = {plan.name: plan.deciding(level, study.count) for plan in study.plans if level in plan.values}
    best = study.best(values, key=lambda name: statistics.fmean(values[name].values()))
    cheap = sorted((p for p in study.plans if p.name in values), key=lambda plan: statistics.fmean(plan.seconds))
    for plan in cheap:
        ahead, error = difference(values[best], values[plan.name])
        if plan.name == best or abs(ahead) <= ERRORS * error:
            break
    behind = "-" if plan.name == best else with_error(abs(ahead), error, digits=1)
    return {"study": study.name, "level": level_name(level), "best": best, "take": plan.name, "behind by": behind}


def table(studies: Sequence[Study]) -> str:
    """Markdown: for each study a row for each plan and a column for each level, then what to take."""
    parts: list[str] = []
    for study in studies:
        parts += [f"## {study.name}: {' / '.join(study.columns)}", "", markdown_table(list(_rows(study))), ""]
    verdicts = [verdict(study, level) for study in studies for level in study.levels if _repeated(study, level)]
    return "\n".join(parts + (["## What to take", "", markdown_table(verdicts)] if verdicts else []))


def _repeated(study: Study, level: str) -> bool:
    """Whether there are several plans at a level, and several seeds, so that errors are known."""
    found = [plan.values[level] for plan in study.plans if level in plan.values]
    return len(found) > 1 and any(len(seeds) > 1 for seeds in found)


def _rows(study: Study) -> Iterator[dict[str, str]]:
    """The dense models, then the plans from the worst to the best."""

    def rank(plan: Plan) -> float:
        means = [statistics.fmean(plan.deciding(level, study.count).values()) for level in plan.values]
        return statistics.fmean(means) * (1 if study.best is max else -1)

    for plan in [*study.dense, *sorted(study.plans, key=rank)]:
        pruned = plan not in study.dense
        row = {"plan": plan.name}
        for level in study.levels:
            own = level if pruned else "0"
            row[level_name(level)] = _cell(plan.summary(own)) if own in plan.values else "-"
        row["seconds"] = f"{statistics.fmean(plan.seconds):.1f}" if pruned else "-"
        yield row | {"MB": f"{max(plan.peaks):.0f}" if pruned else "-"}


def _cell(summary: Sequence[tuple[float, float | None]]) -> str:
    return " / ".join(with_error(*value, digits=1) for value in summary)


def write_table(folder: Path) -> tuple[Path, str]:
    """Write `table` of the results in `folder` to `folder`/table.md, with all rows in results.csv, a picture of the
    curves of each study with several levels, and one of all of them, `PICTURE`; return the path and the table.

    Of a study whose plans have a level each (budgets of modalities) a picture of each level has the plans side by side.
    """
    studies = read_studies(folder)
    text, path = table(studies), folder / "table.md"
    write_atomic(path, f"# Quality at each sparsity\n\n{WHAT}\n\n{text}\n".encode())
    write_atomic(folder / "results.csv", _merged(studies).encode())
    several = [study for study in studies if len(study.levels) > 1]
    drawn = [study for study in several if any(len(plan.values) > 1 for plan in study.plans)]
    for study in several:
        if study not in drawn:
            _plot_side_by_side(folder, study)
    for study in drawn:
        levels, curves, flat = _curves(study)
        panels = [Panel(axis_name(column), levels, plans, flat[column]) for column, plans in curves.items()]
        plot_panels(folder / f"{study.name}.png", panels, f"{study.name}: quality without training")
    if drawn:
        plot_panels(folder / PICTURE, [_panel(study) for study in drawn], "Quality without training")
    return path, text


def _plot_side_by_side(folder: Path, study: Study) -> None:
    for level in study.levels:
        plans = sorted((plan for plan in study.plans if level in plan.values), key=lambda plan: plan.name)
        values = zip(*(plan.summary(level) for plan in plans), strict=True)
        names, flat = [plan.name for plan in plans], _curves(study)[2]
        panels = [
            Panel(axis_name(column), names, {level_name(level): list(own)}, flat[column], across="plan")
            for column, own in zip(study.columns, values, strict=True)
        ]
        plot_panels(folder / f"{study.name}_{level}.png", panels, f"{study.name}, {level_name(level)}")


def _panel(study: Study) -> Panel:
    """The curves of a study's first measure."""
    levels, curves, flat = _curves(study)
    column = study.columns[0]
    return Panel(axis_name(column), levels, curves[column], flat[column], study.name)


def _merged(studies: Sequence[Study]) -> str:
    """All rows as CSV, one for each measure; `config` names all that decides a result but for level and seed."""
    text = io.StringIO()
    kept = ("sparsity", "seed", "config", "date", *COSTS)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["study", "plan", *kept, "measure", "value"])
    for study in studies:
        for row in study.rows:
            for column in study.columns:
                writer.writerow([study.name, _plan(row), *(row[key] for key in kept), column, row[column]])
    return text.getvalue()


def _curves(study: Study) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Levels, column -> plan -> (mean, error) or None at each level, and column -> dense model -> value."""
    levels = study.levels
    curves: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for i, column in enumerate(study.columns):
        curves[column] = {
            plan.name: [plan.summary(level)[i] if level in plan.values else None for level in levels]
            for plan in study.plans
        }
        flat[column] = {plan.name: plan.summary("0")[i][0] for plan in study.dense}
    return [level_name(level) for level in levels], curves, flat
