"""One HTML file of the pruning runs in a folder: no server, no other file, pictures inside as data URIs."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.finished.markdown import data_uri, to_html
from engine.reports.plots import plot_panels
from engine.reports.report import DENSE, FACTS, markdown_table
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

PAGE = "report.html"
_FIRST = "R@1"  # of the measures of retrieval, those that are drawn; of others the first
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0 }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } summary { cursor: pointer }
.found td, .found th { text-align: center; vertical-align: top } .found td:first-child { max-width: 260px }
.found img { width: 96px; border: 4px solid #ccc; border-radius: 4px }
.found img.right { border-color: #2a8a3c } .found img.wrong { border-color: #c0392b }
"""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what `FACTS` of it has."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of its table, the dense model first where it was evaluated."""
        return self.told["rows"]

    @property
    def pruned(self) -> list[dict[str, Any]]:
        """Return the rows without the dense model."""
        return [row for row in self.rows if row["sparsity"] != DENSE]


def read_runs(folder: Path) -> list[Run]:
    """Return the runs in `folder`/<pruner>, by name.

    Raises MissingFileError where there is none, UserError for one that is damaged.
    """
    paths = sorted(folder.glob(f"*/{FACTS}"))
    if not paths:
        raise MissingFileError(f"{folder}/<pruner>/{FACTS}: there is none; prune.py --output_dir {folder} writes them")
    return [Run(path.parent, _read(path)) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text())
        assert {"title", "rows", "measures", "retrieved"} <= told.keys()
    except (ValueError, AttributeError, AssertionError):
        raise UserError(f"{path}: not what prune.py writes; delete it, and run that again") from None
    return told


def write_page(folder: Path) -> tuple[Path, str]:
    """Write `folder`/report.html of all runs in it; return its path, and their table."""
    runs = read_runs(folder)
    table = markdown_table(_together(runs))
    parts = [to_html(f"# Pruning runs\n\n{table}", folder), *_curves(runs), *_retrieved(runs)]
    for run in runs:
        parts.append(f"<section>{to_html((run.folder / 'report.md').read_text(), run.folder)}</section>")
    head = f'<meta charset="utf-8"><title>Pruning runs</title><style>{_STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_atomic(folder / PAGE, page.encode())
    return folder / PAGE, table


def _together(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the rows of all runs, the dense model once; "-" where a run has no such column."""
    columns = list(dict.fromkeys(column for run in runs for row in run.rows for column in row))
    first = [("-", row) for row in runs[0].rows if row["sparsity"] == DENSE]
    rows = [*first, *((run.folder.name, row) for run in runs for row in run.pruned)]
    return [{"pruner": name} | {column: row.get(column, "-") for column in columns} for name, row in rows]


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the picture of quality by sparsity, where it was measured."""
    levels = list(dict.fromkeys(row["sparsity"] for run in runs for row in run.pruned))
    levels.sort(key=lambda level: (":" in level, float(level.split(":")[0].split()[0])))
    panels = []
    measures = runs[0].told["measures"]
    for measure in [name for name in measures if name.endswith(_FIRST)] or measures[:1]:
        found = {run.folder.name: {row["sparsity"]: row.get(measure) for row in run.pruned} for run in runs}
        curves = {
            name: [None if values.get(level) is None else (values[level], None) for level in levels]
            for name, values in found.items()
        }
        curves = {name: curve for name, curve in curves.items() if any(curve)}
        dense = [row[measure] for run in runs for row in run.rows if row["sparsity"] == DENSE and measure in row]
        names = [level if ":" in level else f"{level} %" for level in levels]
        panels += [(measure, names, curves, {DENSE: dense[0]} if dense else {})] if curves else []
    if panels:
        with TemporaryDirectory() as folder:
            path = Path(folder, "curves.png")
            plot_panels(path, panels, "Quality by sparsity")
            yield f'<h2>Quality by sparsity</h2><img src="{data_uri(path)}" alt="curves">'


def _retrieved(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the table of captions and what the dense and the pruned models find for them."""
    runs = [run for run in runs if run.told["retrieved"]]
    if not runs:
        return
    shown = runs[0].told["retrieved"]
    runs = [run for run in runs if run.told["retrieved"]["captions"] == shown["captions"]]
    columns = [(DENSE, shown, DENSE)] if DENSE in shown["found"] else []
    for run in runs:
        found = run.told["retrieved"]
        columns += [(f"{run.folder.name} {label}", found, label) for label in found["found"] if label != DENSE]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("caption", "its picture", *(c[0] for c in columns)))
    body = ""
    for i, caption in enumerate(shown["captions"]):
        right = shown["right"][i]
        cells = [f"<td>{html.escape(caption)}</td>", _picture(shown, right, "")]
        cells += [_picture(told, told["found"][label][i], right) for _, told, label in columns]
        body += f"<tr>{''.join(cells)}</tr>"
    yield (
        "<h2>What captions find</h2><p>The picture that each model ranks first for a caption, of all that it is tested"
        f' on.</p><table class="found"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _picture(told: Mapping[str, Any], number: int, right: Any) -> str:
    kind = "" if right == "" else ' class="right"' if number == right else ' class="wrong"'
    source = told["pictures"].get(str(number))
    return f'<td><img src="{source}" alt="picture {number}"{kind}></td>' if source else "<td>unreadable</td>"
