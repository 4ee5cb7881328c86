"""The Markdown of our reports as HTML: headings, lists, tables, pictures and paragraphs, nothing else."""

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path

_PICTURE = re.compile(r"!\[(.*)\]\((.*)\)")
_LONG = 20  # rows of a table that is folded


def data_uri(path: Path) -> str:
    """Return a file as a URI that holds its content. Raises OSError where it cannot be read."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path: Path, alt: str) -> str:
    """Return a picture that is inside the page, in a box that scrolls where the window is too narrow to read it."""
    return f'<div class="wide"><img class="plot" src="{data_uri(path)}" alt="{html.escape(alt)}"></div>'


def anchor(*names: str) -> str:
    """Return the id of the part of a page that has these names, the outermost first."""
    return "-".join(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in names)


def to_html(text: str, folder: Path, name: str = "") -> str:
    """Return a report as HTML, one level of headings lower, its pictures inside.

    folder: in which these are. name: of the report; headings get an id, `anchor(name, heading)`.
    """
    blocks = re.split(r"\n{2,}", text.strip())
    return "\n".join(_block(block.splitlines(), folder, name) for block in blocks if block)


def headings(text: str) -> list[str]:
    """Return the headings of a report, without its title."""
    return re.findall(r"^## (.*)", text, re.MULTILINE)


def _block(lines: Sequence[str], folder: Path, name: str) -> str:
    first = lines[0]
    if heading := re.match(r"(#+) (.*)", first):
        level = len(heading[1]) + 1
        return f'<h{level} id="{anchor(name, heading[2])}">{html.escape(heading[2])}</h{level}>'
    if picture := _PICTURE.fullmatch(first):
        return image(folder / picture[2], picture[1])
    if first.startswith("- "):
        return f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in lines)}</ul>"
    if first.startswith("|"):
        return _folded([_cells(line) for line in lines])
    return f"<p>{html.escape(' '.join(lines))}</p>"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _folded(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of a header, a rule that is left out, and rows; a long one is folded."""
    found = table(rows[0], [[html.escape(cell) for cell in cells] for cells in rows[2:]])
    if len(rows) - 2 <= _LONG:
        return found
    return f"<details><summary>Table of {len(rows) - 2} rows</summary>{found}</details>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table that scrolls by itself where the window is too narrow for it.

    head: names of the columns. rows: cells, as HTML. kind: class of the table, for the style sheet.
    """
    names = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    opened = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="wide">{opened}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
