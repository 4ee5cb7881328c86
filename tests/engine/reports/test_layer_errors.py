"""The table of layers' errors."""

from engine.reports.sensitivity import error_rows

NAN = float("nan")


def test_the_worst_layer_comes_first_and_what_was_not_measured_has_no_column():
    found = {"63": {"a": [0.5, 0.1, NAN, NAN], "b": [0.25, 0.125, NAN, NAN]}}
    rows = error_rows(found)
    assert rows == [
        {"layer": "b", "63: before %": "25", "63: after %": "12.5"},
        {"layer": "a", "63: before %": "50", "63: after %": "10"},
    ]


def test_several_targets_and_held_out_samples():
    found = {"63": {"a": [0.5, 0.1, 0.6, 0.2]}, "2:4": {"a": [0.5, 0.3, NAN, NAN], "b": [0.2, 0.2, NAN, NAN]}}
    first, second = error_rows(found)
    assert [first["layer"], second["layer"]] == ["a", "b"]
    assert first["63: held out after %"] == "20" and "2:4: held out after %" not in first
    assert second["63: before %"] == "-" and second["2:4: after %"] == "20"


def test_without_errors_there_is_no_table():
    assert error_rows({}) == []
