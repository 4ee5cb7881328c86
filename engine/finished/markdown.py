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


def to_html(text: str, folder: Path) -> str:
    """Return a report as HTML, one level of headings lower, its pictures inside. folder: in which these are."""
    blocks = re.split(r"\n{2,}", text.strip())
    return "\n".join(_block(block.splitlines(), folder) for block in blocks if block)


def _block(lines: Sequence[str], folder: Path) -> str:
    first = lines[0]
    if heading := re.match(r"(#+) (.*)", first):
        level = len(heading[1]) + 1
        return f"<h{level}>{html.escape(heading[2])}</h{level}>"
    if picture := _PICTURE.fullmatch(first):
        return f'<img src="{data_uri(folder / picture[2])}" alt="{html.escape(picture[1])}">'
    if first.startswith("- "):
        return f"<ul>{''.join(f'<li>{html.escape(line[2:])}</li>' for line in lines)}</ul>"
    if first.startswith("|"):
        return _table([_cells(line) for line in lines])
    return f"<p>{html.escape(' '.join(lines))}</p>"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of a header, a rule that is left out, and rows; a long one is folded."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(row(cells, "td") for cells in rows[2:])
    table = f"<table><thead>{row(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"
    if len(rows) - 2 <= _LONG:
        return table
    return f"<details><summary>{len(rows) - 2} rows</summary>{table}</details>"
