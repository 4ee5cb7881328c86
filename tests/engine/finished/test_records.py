"""The table of records, and what scripts/records.sh runs for it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import prune
from engine.finished.records import write_records
from sparsity.errors import MissingFileError, UserError
from tests.processes import PLAIN

ROOT = Path(__file__).resolve().parents[3]


def write_run(folder, level, rows, measures, calibration="1.0 s, once for all sparsities"):
    path = folder / level.replace(":", "of") / "best" / "report.json"
    path.parent.mkdir(parents=True)
    facts = {"preset": "best, version 2: -p alps", "calibration": calibration}
    path.write_text(json.dumps({"facts": facts, "rows": rows, "measures": measures}))
    (path.parent.parent / "command").write_text("python prune.py -m dino -p best\n")
    return path


def test_a_row_for_each_model_and_level(tmp_path):
    dense, half = (
        {"sparsity": "dense", "top-1": 56.6, "seconds": "-"},
        {"sparsity": "2:4", "top-1": 55.0, "seconds": "9"},
    )
    after = {"sparsity": "2:4 recovered", "top-1": 56.04, "seconds": "30.2"}
    levels = [half | {"sparsity": "63", "top-1": 52.0}, half | {"sparsity": "75", "top-1": 50.0}]
    write_run(tmp_path / "dino", "63,75", [dense, *levels], ["top-1", "top-5"])
    write_run(tmp_path / "dino", "2:4", [dense, half, after], ["top-1", "top-5"])
    (tmp_path / "dino/int8").mkdir()
    (tmp_path / "dino/int8/results.csv").write_text("pruner,top-1\ndense,1\ndense int8,56.63\nrand,3\n")
    recalls = [row | {"i2t R@1": 60.0, "t2i R@1": 50.0} for row in (dense, half)]
    write_run(tmp_path / "xvlm", "2:4", recalls, ["i2t R@1", "i2t R@5", "t2i R@1"])
    path, table = write_records(tmp_path)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    plan, command = "best, version 2: -p alps", "`python prune.py -m dino -p best`"
    assert rows == [
        ["dino", "2:4", "top-1", "55.0", "56.0", "56.6", "56.6", plan, "10 + 30", command],
        ["dino", "63 %", "top-1", "52.0", "-", "56.6", "56.6", plan, "10", command],
        ["dino", "75 %", "top-1", "50.0", "-", "56.6", "56.6", plan, "10", command],
        ["xvlm", "2:4", "i2t R@1 / t2i R@1", "60.0 / 50.0", "-", "60.0 / 50.0", "-", plan, "10", command],
    ]
    assert table in path.read_text()


def test_what_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"scripts/records.sh makes them"):
        write_records(tmp_path)
    write_run(tmp_path / "dino", "75", [{"sparsity": "dense"}], ["top-1"])
    with pytest.raises(UserError, match=r"75/best/report.json: not what prune.py --evaluate writes"):
        write_records(tmp_path)


@pytest.mark.script
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_the_script_runs_each_record_once(tmp_path):
    log, stub = tmp_path / "log", tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    given = {**os.environ, **PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1"}
    for _ in range(2):  # what is done is not done twice
        subprocess.run([ROOT / "scripts/records.sh"], env=given, check=True, capture_output=True)
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    assert commands.count(["compare.py", "--records", str(tmp_path / "out")]) == 2
    pruned = [prune.parse(command[1:]) for command in commands if command[0] == "prune.py"]
    asked = [(args.model, str(args.pattern or args.sparsities)) for args in pruned]
    levels = ("50,63,75,90", "2:4")
    assert sorted(asked) == sorted((model, level) for model in ("xvlm", "blip", "dino") for level in levels)
    assert all(args.evaluate and args.recover == 200 for args in pruned)
    assert {args.num_batches for args in pruned if args.model == "dino"} == {32}
    compared = [compare.parse(command[1:]) for command in commands if "--int8" in command]
    assert sorted((args.model, args.k_test) for args in compared) == [("blip", 8), ("dino", 0), ("xvlm", 8)]
