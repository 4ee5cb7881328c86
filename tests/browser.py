"""A headless Chromium that opens a page of ours, without a network, and tells what a reader would see."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import PATIENCE

PHONE, DESK = 420, 1400  # widths of windows, in pixels
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_BROWSER = next((path for name in _NAMES if (path := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(
    not _BROWSER, reason=f"none of {', '.join(_NAMES)} is on PATH: apt-get install chromium, or Google Chrome's package"
)

# The page is in a frame of the wanted width, of the same origin, so that a script beside it can look into it; nothing
# is added to the page. Long tables are unfolded first.
_WRAPPER = """<!doctype html><html><head><meta charset="utf-8"><link rel="icon" href="data:,"></head>
<body style="margin: 0"><iframe style="border: 0; width: {width}px; height: {height}px" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const all = (what, told) => [...page.querySelectorAll(what)].map(told);
  all("details", one => one.open = true);
  const text = one => one.innerText.trim();
  const seen = {{
    headings: all("h1, h2, h3", text),
    images: all("img", one => [one.alt, one.naturalWidth]),
    broken: all("a", one => one.getAttribute("href")).filter(to => to[0] != "#" || !page.getElementById(to.slice(1))),
    repeated: all("[id]", one => one.id).filter((id, i, ids) => ids.indexOf(id) < i),
    requests: view.performance.getEntries().map(one => one.name).filter(name => /^(https?|file|ftp):/.test(name)),
    tables: all("table", one => [...one.rows].map(row => [...row.cells].map(text))),
    width: page.documentElement.scrollWidth,
  }};
  const told = document.createElement("script");
  told.type = "application/json";
  told.textContent = JSON.stringify(seen).replaceAll("<", "\\\\u003c");
  document.head.append(told);
}});
</script></body></html>
"""
_OPTIONS = (
    "--headless",
    "--no-sandbox",  # which needs rights that a container may lack; the page is ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=20000",
)


@dataclass(frozen=True)
class Seen:
    """Hold what a browser made of a page.

    images: alternative text and width in pixels, 0 where it is not a picture. broken: links that lead to nothing in
    the page. repeated: ids that are there twice. requests: addresses outside the page. tables: rows of cells. width: of
    what there is to scroll, in pixels. console: errors and other messages. screenshot: of the page from its top.
    """

    headings: list[str]
    images: list[tuple[str, int]]
    broken: list[str]
    repeated: list[str]
    requests: list[str]
    tables: list[list[list[str]]]
    width: int
    console: list[str]
    screenshot: Image.Image


def look(page: str, folder: Path, width: int = PHONE, height: int = 3000) -> Seen:
    """Open a page, given as HTML, in a window of this width. folder: for files of the browser."""
    folder.mkdir(parents=True, exist_ok=True)
    wrapper, shot = folder / "wrapper.html", folder / "shot.png"
    wrapper.write_text(_WRAPPER.format(width=width, height=height, page=html.escape(page)))
    own = (f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}", f"--window-size={max(width, 500)},{height}")
    command = [_BROWSER, *_OPTIONS, *own, "--dump-dom", wrapper.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    found = re.search(r'<script type="application/json">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stderr
    with Image.open(shot) as image:
        picture = image.convert("RGB").crop((0, 0, width, height))
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(**json.loads(found[1]), console=console, screenshot=picture)
