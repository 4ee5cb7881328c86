"""scripts/nm_table.sh: what it runs, that it runs nothing twice, and its table."""

import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import maskllm_train
import oneshot_pruning_timm
import timm_validate
from engine.finished.nm_table import METHODS, read_results, table
from tests.processes import PLAIN
from tests.test_scripts import refused

pytestmark = pytest.mark.script

ROOT = Path(__file__).resolve().parent.parent

# In place of python: writes down its arguments, and leaves the results that the script looks for.
STUB = """#!{python}
import json, pathlib, sys
given = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(given) + "\\n")
at = lambda name: given[given.index(name) + 1]
if {stop!r} and {stop!r} in " ".join(given):
    sys.exit(2)
if given[0] == "oneshot_pruning_timm.py":
    path = pathlib.Path(at("--save-model"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
elif given[0] == "timm_validate.py":
    print(json.dumps({{"top1": 61.5}}))
elif given[0] == "maskllm_train.py":
    assert pathlib.Path(at("--sparse-checkpoint")).is_file()
    folder = pathlib.Path(at("--output"), at("--experiment"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({{"test": {{"top1": 70 + int(at("--seed"))}}}}))
"""


@pytest.fixture
def recipe(tmp_path):
    """Runs the script with the stub; the commands that it gave."""

    def run(stop="", code=0, **environment):
        log, stub = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        stub.write_text(STUB.format(python=sys.executable, log=str(log), stop=stop))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        given = {**PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1", **environment}
        done = subprocess.run([ROOT / "scripts/nm_table.sh"], env=given, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_every_method_with_every_seed_once(tmp_path, recipe):
    stopped = recipe(stop="--seed 1 --skip-eval", code=1)
    assert stopped[-1][0] == "oneshot_pruning_timm.py"
    commands = [*stopped[:-1], *recipe()]
    parsers = {"oneshot_pruning_timm.py": oneshot_pruning_timm, "timm_validate.py": timm_validate}
    parsers |= {"maskllm_train.py": maskllm_train}
    for script, *arguments in commands[:-1]:
        parsers[script].parse(arguments)
    assert commands[-1] == ["compare.py", "--nm", str(tmp_path / "out/results")]
    assert len({json.dumps(command) for command in commands}) == len(commands)
    counts = [sum(command[0] == script for command in commands) for script in parsers]
    assert counts == [1 + 3 * 3, 2 + 3 * 3, 4 * 3]  # magnitude draws nothing
    assert recipe() == [commands[-1]]
    found = read_results(tmp_path / "out/results")
    assert found.keys() == METHODS.keys()
    assert found["dense"] == {0: 61.5} and found["maskllm_long_magnitude"] == {0: 70, 1: 71, 2: 72}


def test_the_table_has_means_and_standard_errors(tmp_path, capsys):
    for method, values in {"dense": [80], "wanda": [60, 61, 65]}.items():
        (tmp_path / method).mkdir()
        for seed, value in enumerate(values):
            (tmp_path / method / f"{seed}.json").write_text(json.dumps({"top1": value}))
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table(read_results(tmp_path)).splitlines()]
    assert rows[2] == ["dense", "-", "1", "80.00", "79.15"]
    assert rows[3] == ["Wanda", "-", "3", "62.00 ± 1.53", "63.28"]  # sqrt(7 / 3)
    compare.main(["--nm", str(tmp_path)])
    assert "62.00 ± 1.53" in capsys.readouterr().out and "62.00 ± 1.53" in (tmp_path / "table.md").read_text()


def test_what_cannot_be_put_in_a_table(tmp_path, capsys):
    assert "there is none; scripts/nm_table.sh" in refused(capsys, compare.main, ["--nm", str(tmp_path / "nowhere")])
    (tmp_path / "dense").mkdir()
    for content in ("{", "[]", '{"top5": 3}', '{"top1": "high"}'):
        (tmp_path / "dense/0.json").write_text(content)
        assert "dense/0.json: not the accuracy of a model" in refused(capsys, compare.main, ["--nm", str(tmp_path)])
    (tmp_path / "dense").rename(tmp_path / "dens")
    assert "expected <method>/<seed>.json" in refused(capsys, compare.main, ["--nm", str(tmp_path)])
