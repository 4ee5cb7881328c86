"""One HTML file of the pruning runs in a folder: no server, no other file, pictures inside as data URIs."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.finished.markdown import anchor, headings, to_html
from engine.finished.sections import Run, Section, sections, together
from engine.reports.report import FACTS, markdown_table
from sparsity.errors import MissingFileError, UserError
from sparsity.files import write_atomic

PAGE = "report.html"
# Nothing but what is in the file: a browser refuses all else.
_HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">"""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto; padding: 1em; color: #222;
  background: #fff; overflow-wrap: break-word }
h1 { line-height: 1.2 } h2 { border-top: 1px solid #ccc; padding-top: .8em; margin-top: 1.6em }
p, dl { max-width: 75ch }
nav { background: #f4f4f4; padding: .6em 1em; border-radius: 4px } nav p { margin: .3em 0; max-width: none }
a { color: #0b57a4 } small { color: #555 } summary { cursor: pointer; padding: .3em 0 }
dt { font-weight: 600 } dd { margin: 0 0 .4em 1.2em }
.wide { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .left th, .left td { text-align: left }
.number { display: inline-block; min-width: 2.8em; text-align: right }
.bar { display: inline-block; width: 110px; height: .7em; background: #e4e4e4 }
.bar i { display: block; height: 100%; background: #1f77b4 }
.plot { max-width: 100%; height: auto }
.found td, .found th { text-align: center; vertical-align: top; white-space: normal; min-width: 104px }
.found td:first-child { text-align: left; min-width: 130px; max-width: 260px }
.found img { width: 96px; border: 4px solid #ccc; border-radius: 4px }
.found img.right { border-color: #2a8a3c } .found img.wrong { border-color: #c0392b }
@media (max-width: 800px) { .plot { max-width: none; width: 800px } .bar { width: 50px }
  .parts { display: none } }
"""


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
        if not {"title", "rows", "measures", "retrieved"} <= told.keys():
            raise ValueError("a part is missing")
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not what prune.py writes; delete it, and run that again") from None
    return told


def write_page(folder: Path) -> tuple[Path, str]:
    """Write `folder`/report.html of all runs in it; return its path, and their table."""
    runs = read_runs(folder)
    compared = sections(runs)
    reports = [(run.folder / "report.md").read_text() for run in runs]
    parts = ["<h1>Pruning report</h1>", _navigation(compared, runs, reports)]
    parts += [f'<section id="{each.id}"><h2>{each.heading}</h2>{each.content}</section>' for each in compared]
    for run, report in zip(runs, reports, strict=True):
        parts.append(f'<section id="{anchor("run", run.name)}">{to_html(report, run.folder, run.name)}</section>')
    head = f"{_HEAD}<title>Pruning report</title><style>{_STYLE}</style>"
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    write_atomic(folder / PAGE, page.encode())
    return folder / PAGE, markdown_table(together(runs))


def _navigation(compared: Sequence[Section], runs: Sequence[Run], reports: Sequence[str]) -> str:
    """Return links to the sections that compare the runs, and a line of links for each run."""
    lines = [" · ".join(_link(each.id, each.heading) for each in compared)]
    for run, report in zip(runs, reports, strict=True):
        inside = ", ".join(_link(anchor(run.name, heading), heading) for heading in headings(report))
        lines.append(f'Run {_link(anchor("run", run.name), run.name)}<span class="parts">: {inside}</span>')
    return f"<nav>{''.join(f'<p>{line}</p>' for line in lines)}</nav>"


def _link(target: str, text: str) -> str:
    return f'<a href="#{target}">{html.escape(text)}</a>'
