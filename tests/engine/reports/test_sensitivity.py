"""The sensitivity of layers in the report: the numbers that were measured, and their means over modalities."""

import csv
from fractions import Fraction

import pytest

from engine.reports.sensitivity import report_sensitivity
from sparsity.sensitivity.measured import Sensitivity
from tests.toys import layers, view_of

STEPS = (Fraction(30, 100), Fraction(50, 100), Fraction(70, 100))


@pytest.fixture
def view():
    return view_of(layers((10, 10), (30, 10)), group_of=lambda name: "all")


def test_nothing_is_reported_where_nothing_was_measured(view, tmp_path):
    assert report_sensitivity(tmp_path, view, Sensitivity(), "t") == [] and not list(tmp_path.iterdir())


def test_table_plot_and_file_have_what_was_measured(view, tmp_path):
    errors = {"a.weight": dict(zip(STEPS, (0.1, 0.2, 0.4))), "b.weight": dict(zip(STEPS, (0.2, 0.6, 0.8)))}  # noqa: B905
    outputs = {"a.weight": {STEPS[1]: 3.0}, "b.weight": {STEPS[1]: 0.25}}
    (section,) = report_sensitivity(tmp_path, view, Sensitivity(errors, outputs), "t")
    assert (tmp_path / section.file).stat().st_size > 1000
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.notes[-1].splitlines()]
    assert table[0] == ["layer", "group", "weights", "30 %", "40 %", "50 %", "60 %", "70 %", "output"]
    assert table[2] == ["all of all", "all", "400", "17.5", "33.8", "50", "60", "70", ""]  # (100 a + 300 b) / 400
    assert table[3][3:] == ["10", "15", "20", "30", "40", "3"]
    assert table[4][3:] == ["20", "40", "60", "70", "80", "0.25"]
    with (tmp_path / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [row["relative_error"] for row in rows[3:]] == ["0.2", "0.6", "0.8"]
    assert [row["output_per_error"] for row in rows] == ["", "3.0", "", "", "0.25", ""]
