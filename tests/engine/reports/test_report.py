"""Tables, the CSV of run times, and the report."""

import csv
import threading

from engine.reports.report import Picture, append_csv, markdown_table, write_report

ROWS = [{"sparsity": "dense", "all %": "0.00", "R@1": 41.25}, {"sparsity": "63", "all %": "63.00", "R@1": 7.0}]


def test_a_table_is_markdown_and_lines_up():
    lines = markdown_table(ROWS).split("\n")
    assert lines == [
        "| sparsity | all % |  R@1 |",
        "| -------- | ----: | ---: |",
        "| dense    |  0.00 | 41.2 |",
        "| 63       | 63.00 |  7.0 |",
    ]
    assert len({len(line) for line in lines}) == 1


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "deep" / "runtimes.csv"
    for row in ROWS:
        append_csv(path, [row])
    with path.open(newline="") as file:
        assert [row["sparsity"] for row in csv.DictReader(file)] == ["dense", "63"]
    append_csv(path, [{"sparsity": 'a "b", c', "all %": "", "R@1": 0}] * 2)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file))[-1]["sparsity"] == 'a "b", c'


def test_several_writers_do_not_cut_into_each_other(tmp_path):
    path = tmp_path / "runtimes.csv"
    append_csv(path, [{"writer": "first", "text": ""}])

    def write(number):
        for _ in range(20):
            append_csv(path, [{"writer": number, "text": "x" * 500}] * 3)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 241 and all(row["text"] == "x" * 500 for row in rows[1:])


def test_columns_that_changed_begin_a_new_file(tmp_path):
    path = tmp_path / "runtimes.csv"
    append_csv(path, [{"a": 1, "b": 2}])
    append_csv(path, [{"a": 3, "c": 4}])
    assert path.read_text() == "a,c\n3,4\n"
    assert (tmp_path / "runtimes_old.csv").read_text() == "a,b\n1,2\n"


def test_the_report_has_all_parts(tmp_path):
    layers = [{"layer": "v.0", "group": "vision", "63 %": "60.00"}]
    pictures = [Picture("Sparsity", "p.png", ["A note."]), Picture("Nothing drawn", "", ["Why."])]
    parts = {"rows": ROWS, "warnings": ["63: group text has collapsed"], "pictures": pictures, "layers": layers}
    write_report(tmp_path / "report.md", title="a pruned with b", facts={"seed": 42}, **parts)
    text = (tmp_path / "report.md").read_text()
    for part in ("# a pruned with b", "- seed: 42", markdown_table(ROWS), "collapsed", "](p.png)", "| v.0   |"):
        assert part in text
    assert text.count("](") == 1 and "A note." in text and "Why." in text
    write_report(tmp_path / "report.md", title="a", facts={}, **parts | {"warnings": []})
    assert "Warnings" not in (tmp_path / "report.md").read_text()
