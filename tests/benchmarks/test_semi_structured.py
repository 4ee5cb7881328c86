"""The GPU benchmark runs from end to end without a GPU, and says that it measures nothing then."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.semi_structured import Row, keep_two_of_four, main, quartiles
from sparsity.kernels.semi_structured import is_two_of_four

pytestmark = pytest.mark.script


def test_benchmark_runs_without_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--rounds", "2", "--json", str(tmp_path / "table.json")])
    told = capsys.readouterr().out
    assert "this only tests the script" in told
    assert "failed" not in told and "differ" not in told
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["layer"] * 4 + ["eager", "compiled"]


def test_what_comes_after_the_limit_is_named(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--seconds", "0"])
    assert "left out after 0 s: tiny qkv (192, 64) batch 1" in capsys.readouterr().out


def test_two_of_four_keeps_the_largest() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.5, 0.1, -0.2, 0.3]])
    kept = keep_two_of_four(weight)
    assert kept.tolist() == [[0, -4, 3, 0, 0.5, 0, 0, pytest.approx(0.3)]]
    assert is_two_of_four(kept) and not is_two_of_four(weight)


def test_no_ratio_within_the_noise() -> None:
    row = Row("a", "layer", 1, quartiles([1.0, 2.0, 3.0]), quartiles([2.0, 2.1, 2.2]))
    assert row.line.endswith("| 0.95 (within the noise) |")
    assert Row("a", "layer", 1, (4.0, 4.0, 4.0), (2.0, 2.0, 2.0)).line.endswith("| 2.00 |")
