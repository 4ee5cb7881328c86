"""Many pruners on one model: a row of `results.csv` for each run, and tables of the means over seeds.

Statistics are shared: the pruners that need the same one are scored from one pass over the calibration data of a seed.
"""

import csv
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.pruning import PrunedModel
from engine.contents import contents
from engine.pruning.peak_memory import PeakMemory
from engine.pruning.rounding import int8_weights
from engine.pruning.run import percent, timed
from engine.reports.report import Metrics, append_csv, markdown_table, mean_and_error, with_error
from sparsity.allocation.budget import Sparsity
from sparsity.errors import UserError
from sparsity.files import write_atomic
from sparsity.masks import Masks, state_digest
from sparsity.pattern import NM, Block
from sparsity.run.engine import Engine
from sparsity.run.plan import Plan
from sparsity.run.request import Request
from sparsity.statistics.reading import Calibrations
from sparsity.view import PrunableView

Row = dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A plan of a comparison; pattern, groups: of its own, see `sparsity.run.request.Request`."""

    engine: Engine
    pattern: NM | Block | None = None
    groups: Mapping[str, Sparsity] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """Return the plan."""
        return self.engine.plan

    def request(self, sparsities: Sequence[Sparsity], seed: int) -> Request:
        """Return what is asked of the engine: the pattern, or these sparsities."""
        return Request.of(() if isinstance(self.pattern, NM) else sparsities, self.pattern, seed, self.groups)

    def targets(self, sparsities: Sequence[Sparsity]) -> dict[str, Sparsity]:
        """Return the name in the table of each target -> its sparsity."""
        if isinstance(self.pattern, NM):
            return {str(self.pattern): self.pattern.sparsity}
        return {percent(sparsity): sparsity for sparsity in sparsities}


COSTS = ("calibration_seconds", "selection_seconds", "peak_mb")
Run = tuple[str, str, str]  # pruner, sparsity in per cent, seed
DENSE = "dense"
ANY_SEED = "-"  # seed of a run in which nothing is drawn
DENSE_RUN: Run = (DENSE, "0", ANY_SEED)
INT8 = "dense int8"
INT8_RUN: Run = (INT8, "0", ANY_SEED)


@dataclass(frozen=True)
class Cost:
    """Hold what masks cost: seconds of the statistic that serves all sparsities (and all plans that need the same), and
    of what is done for these masks alone; the peak of memory in bytes.
    """

    calibration: float = 0.0
    selection: float = 0.0
    peak: int = 0


def digests(
    view: PrunableView, sizes: Any, config: PrunedModel, options: Mapping[str, Any], plans: Mapping[str, Entry]
) -> dict[str, str]:
    """Return plan (or a dense model) -> short name of all that decides its results, but for sparsity and seed.

    sizes: of the model, a dataclass. options: of the command line, with `precision` and `num_batches`; what the
    calibration reads counts for the plans that read it. Where the weights lie does not count, what they are does.
    """
    read = dataclasses.asdict(config)
    common = {"weights": state_digest(view.model), "sizes": dataclasses.asdict(sizes)}
    common |= {"evaluation": read["evaluation"], "precision": options["precision"]}
    common |= _held({"evaluation": read["evaluation"]})
    data = {key: read[key] for key in config.CALIBRATION}
    data |= {"num_batches": options["num_batches"], **_held(data)}
    result = {DENSE: _digest(common), INT8: _digest(common | {"rounding": INT8})}
    for name, entry in plans.items():
        own = entry.plan.facts(entry.request((), 0))
        result[name] = _digest(common | own | (data if entry.plan.statistics else {}))
    return result


def _held(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of the files that these settings name, where they name any."""
    found = contents(read)
    return {f"contents of {', '.join(read)}": found} if found else {}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Ledger:
    """`results.csv`, a row for each run, written as soon as the run is done; rows of other configurations stay.

    A line that a killed process left unfinished is removed. Raises UserError for a file with other columns.

    Args:
        groups: of the model's weights; their sparsity is recorded.
        columns: column of the table -> metric.
        digests: of the configuration, for every pruner that will be asked about.
    """

    def __init__(
        self, path: Path, model: str, groups: Iterable[str], columns: Mapping[str, str], digests: Mapping[str, str]
    ):
        self.path, self.model, self.metrics, self.digests = path, model, columns, digests
        self.measures = [*(f"{name} %" for name in (*groups, "all")), *columns]
        self.columns = ["config", "date", "model", "pruner", "sparsity", "seed", *self.measures, *COSTS]
        self.rows = self._read()

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_atomic(self.path, whole.encode())
        reader = csv.DictReader(io.StringIO(whole))
        if whole and reader.fieldnames != self.columns:
            raise UserError(f"{self.path}: has the columns of another model or version; choose another --output_dir")
        return [row for row in reader if row["config"] == self.digests.get(row["pruner"])]

    def find(self, pruner: str, sparsity: str, seed: str) -> Row | None:
        """The row of a run, where it is done."""
        run = (pruner, sparsity, seed)
        return next((row for row in self.rows if (row["pruner"], row["sparsity"], row["seed"]) == run), None)

    def add(
        self, pruner: str, sparsity: str, seed: str, shares: Mapping[str, float], metrics: Metrics, cost: Cost
    ) -> None:
        """shares: sparsity of every group, and of "all", as fractions."""
        row: dict[str, Any] = {"config": self.digests[pruner], "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        row |= {"model": self.model, "pruner": pruner, "sparsity": sparsity, "seed": seed}
        row |= {f"{name} %": f"{100 * share:.4f}" for name, share in shares.items()}
        row |= {name: f"{metrics[key]:.4f}" for name, key in self.metrics.items()}
        spent = (f"{cost.calibration:.2f}", f"{cost.selection:.2f}", f"{cost.peak / 1e6:.0f}")
        row |= dict(zip(COSTS, spent, strict=True))
        append_csv(self.path, [row])
        self.rows.append(row)


def seeds_of(entry: Entry, seeds: Sequence[int]) -> list[str]:
    """Return the seeds, as they stand in the table, under which a plan gives different masks: one where nothing is
    drawn.
    """
    return [str(seed) for seed in seeds] if entry.plan.statistics or entry.plan.score.draws else [ANY_SEED]


def sharing(plans: Mapping[str, Entry]) -> list[list[str]]:
    """Return the names of the plans, those together that measure the same in the same way."""
    together: dict[Any, list[str]] = {}
    for name, entry in plans.items():
        plan = entry.plan
        request = entry.request([], 0)
        anew = plan.whole or plan.by_blocks(request) or plan.joint(request) or plan.learned or plan.probes
        same = (tuple(plan.statistics), type(plan.score).prepare, plan.offload) if not anew else name
        together.setdefault(same, []).append(name)
    return list(together.values())


def compare(
    view: PrunableView,
    plans: Mapping[str, Entry],
    sparsities: Sequence[Sparsity],
    seeds: Sequence[int],
    ledger: Ledger,
    *,
    calibrations: Callable[[str, int], Calibrations],
    evaluate: Callable[[], Metrics],
    int8: bool = False,
) -> None:
    """Run every plan at every sparsity under every seed, and the dense model, but for what the ledger has already.

    calibrations: (name of a plan, seed) -> the passes of its epochs. evaluate: metrics of the model as it is. int8: the
    dense model with weights of 8 bits, too.
    """
    runs = wanted(plans, sparsities, seeds, int8)
    with tqdm(total=len(runs), desc="runs", unit="run", leave=False) as bar:
        bar.update(sum(ledger.find(*run) is not None for run in runs))
        for run in dense_runs(int8):
            if ledger.find(*run) is None:
                with int8_weights(view).applied(view) if run == INT8_RUN else nullcontext():
                    ledger.add(*run, dict.fromkeys([*view.groups, "all"], 0.0), evaluate(), Cost())
                bar.update()
        for seed, todo in _passes(plans, sparsities, seeds, ledger):
            for run, masks, cost in _masks(view, plans, seed, todo, calibrations):
                report = masks.report(view)
                shares = {name: count.sparsity for name, count in report.groups.items()}
                with masks.applied(view):
                    metrics = evaluate()
                ledger.add(*run, shares | {"all": report.overall.sparsity}, metrics, cost)
                bar.update()


def dense_runs(int8: bool) -> list[Run]:
    """Return the runs that prune nothing."""
    return [DENSE_RUN, INT8_RUN] if int8 else [DENSE_RUN]


def wanted(
    plans: Mapping[str, Entry], sparsities: Sequence[Sparsity], seeds: Sequence[int], int8: bool = False
) -> list[Run]:
    """Return the runs of a comparison: the dense model, then by target, plan and seed."""
    labels = dict.fromkeys(label for entry in plans.values() for label in entry.targets(sparsities))
    runs = [
        (name, label, own)
        for label in labels
        for name, entry in plans.items()
        if label in entry.targets(sparsities)
        for own in seeds_of(entry, seeds)
    ]
    return [*dense_runs(int8), *runs]


def _passes(
    plans: Mapping[str, Entry], sparsities: Sequence[Sparsity], seeds: Sequence[int], ledger: Ledger
) -> Iterator[tuple[int, list[tuple[str, str, dict[str, Sparsity]]]]]:
    """(seed, [(plan, seed in the table, targets not yet done)]): what one statistic of a seed is needed for."""
    for number, seed in enumerate(seeds):
        for names in sharing(plans):
            todo = []
            for name in names:
                for own in seeds_of(plans[name], seeds)[number : number + 1]:
                    targets = plans[name].targets(sparsities).items()
                    missing = {label: s for label, s in targets if not ledger.find(name, label, own)}
                    todo += [(name, own, missing)] if missing else []
            if todo:
                yield seed, todo


def _masks(
    view: PrunableView,
    plans: Mapping[str, Entry],
    seed: int,
    todo: Sequence[tuple[str, str, Mapping[str, Sparsity]]],
    calibrations: Callable[[str, int], Calibrations],
) -> Iterator[tuple[Run, Masks, Cost]]:
    """(run, its masks, what they cost), all from one statistic."""
    first, peak, begin = todo[0][0], PeakMemory(view.device), time.perf_counter()
    targets = {label: sparsity for _, _, missing in todo for label, sparsity in missing.items()}
    request = plans[first].request(list(targets.values()), seed)
    measured = plans[first].engine.measure(view, calibrations(first, seed)(0), request)
    calibration, of_statistic = time.perf_counter() - begin, peak.read()
    for name, own, missing in todo:
        request = plans[name].request(list(missing.values()), seed)
        masks = plans[name].engine.masks(view, measured, request, calibrations(name, seed))
        chosen = timed(masks, plans[name].plan.one_pass)
        for label, (_, masks, seconds) in zip(missing, chosen, strict=True):
            yield (name, label, own), masks, Cost(calibration, seconds, max(of_statistic, peak.read()))
            peak.reset()


def summarise(ledger: Ledger, runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Over the seeds of these runs, of those that are done: rows {"pruner", "sparsity", "seeds" (how many), and for
    each measure (mean, standard error or None)}.
    """
    cells: dict[tuple[str, str], list[Row]] = {}
    for pruner, sparsity, seed in runs:
        row = ledger.find(pruner, sparsity, seed)
        if row is not None:
            cells.setdefault((pruner, sparsity), []).append(row)
    return [
        {"pruner": pruner, "sparsity": sparsity, "seeds": ANY_SEED if rows[0]["seed"] == ANY_SEED else str(len(rows))}
        | {key: mean_and_error([float(row[key]) for row in rows]) for key in ledger.measures}
        for (pruner, sparsity), rows in cells.items()
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table."""
    return markdown_table([{key: _text(value, " ± ") for key, value in row.items()} for row in rows])


def latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a LaTeX tabular, for the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    body, last = [], None
    for row in rows:
        if last not in (None, row["sparsity"]):
            body.append(r"\midrule")
        last = row["sparsity"]
        body.append(line([_escaped(_text(value, r" $\pm$ ")) for value in row.values()]))
    begin = rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}"
    head = line([_escaped(key) for key in rows[0]])
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def write_tables(folder: Path, model: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """`table.md` and `table.tex`; returns the summary for the reader of the terminal."""
    table = markdown(rows)
    what = "Quality without training and sparsity of each group, in per cent: mean ± standard error over the seeds."
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    write_atomic(folder / "table.md", f"# Pruners of {model}\n\n{what}\n\n{listed}\n\n{table}\n".encode())
    write_atomic(folder / "table.tex", latex(rows).encode())
    files = "\n".join(f"  {folder / name}" for name in ("results.csv", "table.md", "table.tex"))
    return f"\n{table}\n\nresults:\n{files}"


def _text(value: Any, sign: str) -> str:
    return with_error(*value, digits=1, sign=sign) if isinstance(value, tuple) else str(value)


def _escaped(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_")
