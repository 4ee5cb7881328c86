"""benchmark.py measures a bundled model in all its variants, and refuses what it cannot measure."""

import csv
import importlib.util
from pathlib import Path

import pytest

import benchmark
import prune
from engine.deployment.options import PACKAGES
from sparsity.errors import UserError

pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]
ONNX = all(importlib.util.find_spec(name) for name in PACKAGES)


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    how = ["-p", "omp", "-s", "90", "--accelerator", "cpu"]
    prune.main(["-m", "dino", "--variant", "mini", *how, "--output_dir", str(folder)])
    (path,) = folder.glob("omp/*_pruning_masks.safetensors")
    assert path.name == "dino_omp_90_seed42_pruning_masks.safetensors"
    return path


def measured(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "speed.csv").open() as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_all_variants_of_a_bundled_model(mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "dense,masked,packed,accelerated" + (",onnx,int8" if ONNX else "")
    options = ["--mask", str(mask), "--variants", kinds, "--batch_sizes", "2", "--rounds", "2", "-o", str(tmp_path)]
    benchmark.main(["-m", "dino", "--variant", "mini", "--accelerator", "cpu", *options])
    rows = measured(tmp_path)
    onnx = [f"ONNX {kind}{name}" for kind in ("", "int8 ") for name in ("dense", "pruned")] if ONNX else []
    assert list(rows) == ["dense", "masked", "packed", "accelerated", *onnx]
    assert float(rows["packed"]["MB on disk"]) < 0.25 * float(rows["dense"]["MB on disk"])
    assert float(rows["masked"]["G multiply-adds"]) < 0.2 * float(rows["dense"]["G multiply-adds"])
    assert rows["packed"]["ms"] == "as masked" and all(
        float(row["ms"]) > 0 for name, row in rows.items() if name != "packed"
    )
    report = (tmp_path / "speed.md").read_text()
    assert "90.00 % of the prunable weights" in report and "| vit.encoder.layer.0" in report
    assert "report:" in capsys.readouterr().out


def test_a_tower_pair_without_a_dense_model(tmp_path: Path) -> None:
    prune.main(
        ["-m", "xvlm", "--variant", "mini", "-p", "omp", "-s", "90", "--save_model", "--output_dir", str(tmp_path)]
    )
    (weights,) = tmp_path.glob("omp/*_model.safetensors")
    options = ["--variants", "masked,accelerated", "--batch_sizes", "1", "--rounds", "1", "-o", str(tmp_path / "out")]
    benchmark.main(["-m", "xvlm", "--variant", "mini", "--weights", str(weights), *options])
    assert list(measured(tmp_path / "out")) == ["masked", "accelerated"]


def test_what_is_refused(tmp_path: Path) -> None:
    few = ["-m", "dino", "--variant", "mini", "-o", str(tmp_path)]
    with pytest.raises(UserError, match="the weights have no zeros"):
        benchmark.main([*few, "--variants", "masked"])
    with pytest.raises(UserError, match="there is no such file"):
        benchmark.main([*few, "--mask", str(tmp_path / "none.safetensors")])
    for options in (["--variants", "fast"], ["--batch_sizes", "0"]):
        with pytest.raises(SystemExit):
            benchmark.main([*few, *options])
