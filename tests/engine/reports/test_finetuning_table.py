"""Ways of training beside each other, over seeds."""

import json

import pytest

from engine.finished.finetuning_table import ways_table
from sparsity.errors import MissingFileError


def write(folder, way, seed, top1):
    path = folder / "runs" / "images" / way / str(seed) / "result"
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps({"test": {"top1": top1}}))


def test_means_and_standard_errors_over_seeds(tmp_path):
    for seed, top1 in {42: 50.0, 43: 53.0, 44: 56.0}.items():
        write(tmp_path, "gradual", seed, top1)
    write(tmp_path, "plain", 42, 40.0)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ways_table(tmp_path).splitlines()]
    assert rows[0] == ["data", "way", "test", "metric", "mean", "standard error", "seeds"]
    gradual, plain = rows[2:]
    assert gradual[:4] == ["images", "gradual", "test", "top1"] and plain[1] == "plain"
    assert float(gradual[4]) == pytest.approx(53) and float(gradual[5]) == pytest.approx(3 / 3**0.5, abs=0.05)
    assert plain[5] == "-" and (gradual[6], plain[6]) == ("3", "1")


def test_nothing_is_finished(tmp_path):
    with pytest.raises(MissingFileError, match="fine-tune first"):
        ways_table(tmp_path)
