"""The table of quality, bytes and time, and what scripts/tradeoff.sh runs for it."""

import csv
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark
import compare
import prune
from engine.finished.tradeoff import level_of, write_tradeoff
from sparsity.errors import MissingFileError, UserError
from tests.processes import PLAIN

ROOT = Path(__file__).resolve().parents[3]


def write_run(folder: Path, dense_ms: float, quality: dict[str, float]) -> None:
    """Write speed.csv as benchmark.py does; each variant takes half the time of the dense model, int8 a quarter."""
    times = {"dense": 1, "packed": None, "accelerated": 2, "ONNX int8 dense": 4, "ONNX int8 pruned": 4}
    sizes = {"dense": 16, "packed": 2, "accelerated": 0, "ONNX int8 dense": 4, "ONNX int8 pruned": 4}
    folder.mkdir(parents=True)
    with (folder / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["variant", "batch", "MB on disk", "ms", *quality])
        writer.writeheader()
        for name, factor in times.items():
            for batch in (1, 8):
                ms = f"{batch * dense_ms / factor:.2f}" if factor else "as masked"
                own = {key: f"{value - (factor or 0):.2f}" if factor else "-" for key, value in quality.items()}
                writer.writerow({"variant": name, "batch": batch, "MB on disk": f"{sizes[name]:.2f}", "ms": ms, **own})


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_means_and_errors_over_seeds_against_the_dense_model_of_the_same_run(tmp_path: Path) -> None:
    for seed, ms, top1 in (("42", 4.0, 52.0), ("43", 8.0, 54.0)):  # the machine was slower in the second run
        write_run(tmp_path / "dino/75" / seed, ms, {"top-1": top1, "top-5": 80.0})
        write_run(tmp_path / "dino/2of4" / seed, ms, {"top-1": top1, "top-5": 80.0})
    write_run(tmp_path / "xvlm/block4x4_90/42", 4.0, {"i2t R@1": 60.0, "i2t R@5": 1.0, "t2i R@1": 50.0})
    path, table = write_tradeoff(tmp_path)
    header, _, *rows = cells(table)
    assert header == [
        *("model", "zeros", "stored", "run by", "measure", "quality", "bytes", "batch 1", "batch 8", "runs")
    ]
    kernels = "sparse kernels where they are faster"
    assert rows == [
        ["dino", "-", "float32", "dense layers", "top-1", "52.0 ± 0.6", "1.000", "1.00", "1.00", "4"],
        ["dino", "-", "int8", "ONNX Runtime", "top-1", "49.0 ± 0.6", "0.250", "4.00", "4.00", "4"],
        ["dino", "75 %", "packed", kernels, "top-1", "51.0 ± 1.0", "0.125", "2.00", "2.00", "2"],
        ["dino", "75 %", "int8, zeros kept", "ONNX Runtime", "top-1", "49.0 ± 1.0", "0.250", "4.00", "4.00", "2"],
        ["dino", "2:4", "packed", kernels, "top-1", "51.0 ± 1.0", "0.125", "2.00", "2.00", "2"],
        ["dino", "2:4", "int8, zeros kept", "ONNX Runtime", "top-1", "49.0 ± 1.0", "0.250", "4.00", "4.00", "2"],
        *(
            ["xvlm", level, stored, by, "i2t R@1 / t2i R@1", quality, size, times, times, "1"]
            for level, stored, by, quality, size, times in (
                ("-", "float32", "dense layers", "59.0 / 49.0", "1.000", "1.00"),
                ("-", "int8", "ONNX Runtime", "56.0 / 46.0", "0.250", "4.00"),
                ("block4x4 90 %", "packed", kernels, "58.0 / 48.0", "0.125", "2.00"),
                ("block4x4 90 %", "int8, zeros kept", "ONNX Runtime", "56.0 / 46.0", "0.250", "4.00"),
            )
        ),
    ]
    assert table in path.read_text()


def test_what_is_not_there_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"scripts/tradeoff.sh makes them"):
        write_tradeoff(tmp_path)
    write_run(tmp_path / "dino/75/42", 4.0, {"loss": 1.0})
    with pytest.raises(UserError, match=r"42/speed.csv: not what benchmark.py --evaluate writes"):
        write_tradeoff(tmp_path)


def test_folders_are_named_after_levels() -> None:
    assert [level_of(name) for name in ("75", "2of4", "block4x4_90")] == ["75 %", "2:4", "block4x4 90 %"]


# In place of python: writes down its arguments; leaves masks as prune.py names them.
STUB = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "prune.py":
    given = dict(zip(sys.argv[2:], sys.argv[3:]))
    folder = pathlib.Path(given["--output_dir"], given["-p"])
    folder.mkdir(parents=True, exist_ok=True)
    pattern = given.get("--pattern", "")
    levels = [pattern.replace(":", "of")] if ":" in pattern else given["-s"].split(",")
    for level in levels:
        name = "_".join(part for part in (given["-m"], given["-p"], "" if ":" in pattern else pattern, level) if part)
        (folder / f"{{name}}_seed{{given['--seed']}}_pruning_masks.safetensors").touch()
"""


@pytest.mark.script
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_the_script_prunes_once_for_all_levels_and_measures_each(tmp_path: Path) -> None:
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    given = {**os.environ, **PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1"}
    for _ in range(2):  # what is done is not done twice
        subprocess.run([ROOT / "scripts/tradeoff.sh"], env=given, check=True, capture_output=True)
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    assert commands.count(["compare.py", "--tradeoff", str(tmp_path / "out")]) == 2
    assert compare.parse(commands[-1][1:]).tradeoff == tmp_path / "out"
    pruned = [prune.parse(command[1:]) for command in commands if command[0] == "prune.py"]
    asked = [(args.model, args.pattern, args.sparsities, args.seed) for args in pruned]
    patterns = ((None, "75,90"), ("block4x4", "75,90"), ("2:4", None))
    seeds = (42, 43, 44)
    assert sorted(map(str, asked)) == sorted(str((m, *p, s)) for m in ("xvlm", "dino") for p in patterns for s in seeds)
    assert {args.pruner for args in pruned} == {"best"}
    measured = [benchmark.parse(command[1:]) for command in commands if command[0] == "benchmark.py"]
    assert len(measured) == 2 * 5 * 3 and len({args.output_dir for args in measured}) == len(measured)
    for args in measured:
        _, level, seed = args.output_dir.parts[-3:]
        assert args.mask.name == f"{args.model}_best_{level}_seed{seed}_pruning_masks.safetensors"
        assert args.mask.is_file() and args.evaluate and args.batch_sizes == [1, 8]
