"""The page of finished pruning runs: one file, whole, with every picture inside."""

import base64
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from engine.finished.markdown import to_html
from engine.finished.page import write_page
from engine.reports.report import markdown_table
from sparsity.errors import MissingFileError, UserError
from tests.browser import DESK, PHONE, look, needs_browser


class Reader(HTMLParser):
    """Collects pictures, links and text, and checks that tags close in their order."""

    def __init__(self):
        super().__init__()
        self.pictures, self.links, self.text, self.open = [], [], "", []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found)
        self.links += [found[name] for name in ("href", "src") if name in found and tag != "img"]
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def decode(uri):
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:image/png"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def picture(colour):
    content = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def write_run(folder, recall, found, captions=("a <cat>", "a dog")):
    folder.mkdir(parents=True)
    rows = [{"sparsity": "dense", "all %": "0.00", "t2i R@1": 60.0, "seconds": "-"}]
    rows += [{"sparsity": "75", "all %": "75.00", "t2i R@1": recall, "seconds": "1.0"}]
    pictures = {"0": picture("red"), "1": picture("blue")}
    retrieved = {"captions": captions, "right": [0, 1], "found": {"dense": [0, 1], "75": found}, "pictures": pictures}
    told = {"title": folder.name, "rows": rows, "measures": ["t2i R@1"], "retrieved": retrieved}
    (folder / "report.json").write_text(json.dumps(told))
    Image.new("RGB", (6, 5)).save(folder / "heatmap.png")
    layers = markdown_table([{"layer": f"layer {i}", "75 %": "75.00"} for i in range(30)])
    parts = ("# run", "- pruner: a & b", markdown_table(rows), "## Heat", "![Heat](heatmap.png)", "## Layers", layers)
    (folder / "report.md").write_text("\n\n".join(parts))


def test_one_file_has_the_runs_and_all_pictures(tmp_path):
    write_run(tmp_path / "runs/best", 50.0, [0, 1])
    write_run(tmp_path / "runs/plain", 5.0, [0, 0])
    path, table = write_page(tmp_path / "runs")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["-", "best", "plain"]
    reader = read(path.read_text())
    assert not reader.links, "nothing outside"
    sizes = [decode(image["src"]).size for image in reader.pictures]
    assert sizes.count((6, 5)) == 2 and all(image["alt"] for image in reader.pictures)
    retrieved = [image.get("class") for image in reader.pictures if image["alt"].startswith("picture")]
    # For each caption: its picture, dense, best, plain.
    assert retrieved == [None, "right", "right", "right", None, "right", "right", "wrong"]
    assert "a <cat>" in reader.text and "a & b" in reader.text and "30 rows" in reader.text


def test_runs_on_other_captions_are_not_beside_them(tmp_path):
    write_run(tmp_path / "a", 50.0, [0, 1])
    write_run(tmp_path / "b", 5.0, [0, 0], captions=("a tree", "a dog"))
    page = write_page(tmp_path)[0].read_text()
    assert "<th>a 75</th>" in page and "<th>b 75</th>" not in page


def test_what_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"report.json: there is none; prune.py"):
        write_page(tmp_path)
    write_run(tmp_path / "a", 50.0, [0, 1])
    (tmp_path / "a/report.json").write_text("[1")
    with pytest.raises(UserError, match=r"a/report.json: not what prune.py writes"):
        write_page(tmp_path)


def test_markdown_of_reports(tmp_path):
    found = to_html("# One\n\n- a\n- b\n\n| x | y |\n| - | -: |\n| <1> | 2 |\n\ntext\nmore", tmp_path)
    table = "<thead><tr><th>x</th><th>y</th></tr></thead><tbody><tr><td>&lt;1&gt;</td><td>2</td></tr></tbody>"
    assert found.splitlines() == [
        "<h2>One</h2>",
        "<ul><li>a</li><li>b</li></ul>",
        f"<table>{table}</table>",
        "<p>text more</p>",
    ]
