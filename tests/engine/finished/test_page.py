"""The page of finished pruning runs: one file, whole, with every picture inside."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from engine.finished.markdown import to_html
from engine.finished.page import write_page
from engine.reports.report import markdown_table
from sparsity.errors import MissingFileError, UserError
from tests.browser import PHONE, look, needs_browser


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


def write_run(folder, recall, found, captions=("a <cat>", "a dog"), level="75", sensitive=()):
    folder.mkdir(parents=True)
    rows = [{"sparsity": "dense", "all %": "0.00", "t2i R@1": 60.0, "seconds": "-"}]
    rows += [{"sparsity": level, "all %": "75.00", "t2i R@1": recall, "seconds": "1.0"}]
    pictures = {"0": picture("red"), "1": picture("blue")}
    retrieved = {"captions": captions, "right": [0, 1], "found": {"dense": [0, 1], level: found}, "pictures": pictures}
    facts = {"weights": "w.safetensors"}
    told = {"title": folder.name, "facts": facts, "rows": rows, "measures": ["t2i R@1"], "retrieved": retrieved}
    (folder / "report.json").write_text(json.dumps(told))
    Image.new("RGB", (1400, 50)).save(folder / "heatmap.png")
    layers = markdown_table([{"layer": f"layer {i}", "75 %": "75.00"} for i in range(30)])
    parts = ["# run", "- pruner: a & b", markdown_table(rows), "## Heat", "![Heat](heatmap.png)", "## Layers", layers]
    if sensitive:
        parts += ["## Sensitivity of layers and modalities", "A table."]
        head = "layer,group,weights,sparsity,relative_error,output_per_error"
        lines = [f"{name},text,1000,{s},{e * s},{''}" for name, e in sensitive for s in (0.3, 0.8)]
        (folder / "sensitivity.csv").write_text("\n".join([head, *lines]))
    (folder / "report.md").write_text("\n\n".join(parts))


def test_one_file_has_the_runs_and_all_pictures(tmp_path):
    write_run(tmp_path / "runs/best", 50.0, [0, 1])
    write_run(tmp_path / "runs/plain", 5.0, [0, 0])
    path, table = write_page(tmp_path / "runs")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["-", "best", "plain"]
    reader = read(path.read_text())
    assert {link for link in reader.links if link[0] != "#"} == {"data:,"}, "nothing outside"
    sizes = [decode(image["src"]).size for image in reader.pictures]
    assert sizes.count((1400, 50)) == 2 and all(image["alt"] for image in reader.pictures)
    retrieved = [image.get("class") for image in reader.pictures if image["alt"].startswith("picture")]
    # For each caption: its picture, dense, best, plain.
    assert retrieved == [None, "right", "right", "right", None, "right", "right", "wrong"]
    assert "a <cat>" in reader.text and "a & b" in reader.text and "30 rows" in reader.text
    for told in ("weights: w.safetensors", "83 %", "plain 75 %: 1 of 2 right", "text-to-image recall"):
        assert told in reader.text


def test_recovered_models_have_a_curve_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("engine.finished.sections.image", lambda path, alt: "")
    monkeypatch.setattr("engine.finished.sections.plot_panels", lambda path, panels, title: drawn.extend(panels))
    write_run(tmp_path / "a", 5.0, [0, 1])
    write_run(tmp_path / "b", 50.0, [0, 1], level="75 recovered")
    write_run(tmp_path / "c", 40.0, [0, 1], level="2:4")
    write_page(tmp_path)
    (panel,) = drawn
    assert panel.measure == "t2i R@1 (%)" and panel.levels == ["75 %", "2:4"] and panel.flat == {"dense": 60.0}
    curves = {"a": [(5.0, None), None], "b recovered": [(50.0, None), None], "c": [None, (40.0, None)]}
    assert panel.curves == curves


def test_layers_are_ranked_at_the_measured_sparsity_next_to_the_runs(tmp_path):
    write_run(tmp_path / "a", 5.0, [0, 1], sensitive=[(f"layer {i}", i / 100) for i in range(12)])
    page = write_page(tmp_path)[0].read_text()
    section = page[page.index('<section id="sensitivity-of-layers">') :].partition("</section>")[0]
    assert re.findall(r"<td>(layer \d+)</td>", section) == [f"layer {i}" for i in (11, 10, 9, 8, 7, 4, 3, 2, 1, 0)]
    assert "2 layers between" in section and "to 80 %" in section and ">8.8<" in section  # 0.11 * 0.8


def test_runs_on_other_captions_are_not_beside_them(tmp_path):
    write_run(tmp_path / "a", 50.0, [0, 1])
    write_run(tmp_path / "b", 5.0, [0, 0], captions=("a tree", "a dog"))
    page = write_page(tmp_path)[0].read_text()
    assert "a 75 %: 2 of 2 right" in page and "b 75 %:" not in page


def test_what_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"report.json: there is none; prune.py"):
        write_page(tmp_path)
    write_run(tmp_path / "a", 50.0, [0, 1])
    (tmp_path / "a/report.json").write_text("[1")
    with pytest.raises(UserError, match=r"a/report.json: not what prune.py writes"):
        write_page(tmp_path)


def test_markdown_of_reports(tmp_path):
    found = to_html("# One\n\n- a\n- b\n\n| x | y |\n| - | -: |\n| <1> | 2 |\n\ntext\nmore", tmp_path, "run")
    head = '<thead><tr><th scope="col">x</th><th scope="col">y</th></tr></thead>'
    table = f"{head}<tbody><tr><td>&lt;1&gt;</td><td>2</td></tr></tbody>"
    assert found.splitlines() == [
        '<h2 id="run-one">One</h2>',
        "<ul><li>a</li><li>b</li></ul>",
        f'<div class="wide"><table>{table}</table></div>',
        "<p>text more</p>",
    ]


@needs_browser
@pytest.mark.script
def test_a_browser_notices_what_is_broken(tmp_path):
    """So that the test of a whole page, in tests/test_scripts.py, can fail."""
    write_run(tmp_path / "a", 50.0, [0, 1], sensitive=[("layer", 0.5)])
    page = write_page(tmp_path)[0].read_text()
    seen = look(page, tmp_path / "whole", PHONE)
    assert not (seen.broken or seen.repeated or seen.requests or seen.console) and seen.width == PHONE
    pixels = {colour for _, colour in seen.screenshot.getcolors(1 << 22)}
    assert {(255, 0, 0), (0, 0, 255), (42, 138, 60)} <= pixels, "both pictures, and the frame of those that are right"
    damaged = (
        page.replace(picture("red"), picture("red")[:-200], 1)
        .replace('id="sensitivity-of-layers"', 'id="summary"')
        .replace("</body>", '<img src="http://localhost:9/a.png" alt=""><p style="width: 900px">wide</p></body>')
    )
    seen = look(damaged, tmp_path / "damaged", PHONE)
    assert [width for _, width in seen.images].count(0) == 2
    assert seen.broken == ["#sensitivity-of-layers"] and seen.repeated == ["summary"] and seen.width > PHONE
    assert any("Content Security Policy" in line for line in seen.console)
