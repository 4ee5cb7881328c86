"""scripts/own_data.sh: what it runs, that it runs nothing twice, and that runs of other settings are not mixed."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import image_classification
import retrieval
from tests.processes import PATIENCE, PLAIN, ROOT

pytestmark = [pytest.mark.script, pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")]

SCRIPT = ROOT / "scripts/own_data.sh"
WAYS = {"one_shot", "plain", "distilled", "lora", "gradual", "gradual_distilled"}
CAPTIONED = {"dense", "plain", "distilled", "gradual"}
# In place of python: writes down its arguments, and leaves the results that the script looks for.
STUB = """#!{python} -SE
import json, pathlib, sys
given = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(given) + "\\n")
at = lambda name: given[given.index(name) + 1]
if given[0] == {stop!r}:
    sys.exit("error: told to stop")
if given[0] == "prune.py":
    path = pathlib.Path(at("--output_dir"), "omp", "m_pruning_masks.safetensors")
elif given[0] != "-c":
    path = pathlib.Path(at("--output_dir"), "result", "README.md")
else:
    path = pathlib.Path(given[2], "images", "done")
path.parent.mkdir(parents=True, exist_ok=True)
path.touch()
"""


@pytest.fixture
def recipe(tmp_path):
    """Runs the script with the stub; the commands that it gave, or what it said with an exit code."""

    def run(*arguments, stop="", code=0, **environment):
        log, stub = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        stub.write_text(STUB.format(python=sys.executable, log=str(log), stop=stop))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        given = {**PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1", **environment}
        done = subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stderr if code else [json.loads(line) for line in log.read_text().splitlines()]

    return run


def option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize(("given", "seeds"), [([], ["42"]), (["--seeds", "3"], ["42", "43", "44"])])
def test_each_way_is_run_with_each_seed(recipe, given, seeds):
    commands = recipe(*given)
    images = [command for command in commands if command[0] == "image_classification.py"]
    pairs = [command for command in commands if command[0] == "retrieval.py"]
    both = (images, WAYS | {"dense"}, image_classification.parse), (pairs, CAPTIONED, retrieval.parse)
    for found, ways, parse in both:
        folders = [Path(option(command, "--output_dir")) for command in found]
        assert sorted((f.parent.name, f.name) for f in folders) == sorted((way, seed) for way in ways for seed in seeds)
        for command, folder in zip(found, folders, strict=True):
            args = parse(command[1:])
            assert args.seed == int(folder.name) and not args.debug
            assert args.dense == (folder.parent.name in ("dense", "gradual", "gradual_distilled"))
            assert args.dense or args.mask.is_file() and folder.name in args.mask.parts
    pruned = [command for command in commands if command[0] == "prune.py"]
    assert sorted(option(command, "--seed") for command in pruned) == sorted(2 * seeds)
    assert recipe(*given) == commands[-1:], "the table alone"


def test_stopped_it_goes_on(recipe):
    told = recipe(stop="retrieval.py", code=1)
    assert "error: told to stop" in told and "the same command goes on from here" in told
    rest = recipe()
    assert {command[0] for command in rest} == {"retrieval.py", "-c"}


def test_other_settings_have_another_folder(tmp_path, recipe):
    commands = recipe(DEBUG="1", CAPTIONED="0")
    tuned = [command for command in commands if command[0] == "image_classification.py"]
    assert len(tuned) == 7 and all("--debug" in command for command in tuned)
    assert f"{tmp_path}/out is of " in recipe(CAPTIONED="0", code=2)


@pytest.mark.parametrize("given", [["--seeds"], ["--seeds", "0"], ["--seeds", "x"], ["--seed", "3"], ["3"]])
def test_other_arguments_are_refused(recipe, given):
    assert f"expected --seeds N, N from 1 to 99, got '{' '.join(given)}'" in recipe(*given, code=2)


@pytest.mark.slow
def test_it_runs(tmp_path):
    """Really, on a few images, with two seeds."""
    environment = {"PYTHON": sys.executable, "OUTPUT": str(tmp_path / "out"), "DEBUG": "1"}
    environment |= {"IMAGES": "4", "CAPTIONED": "40"}
    done = subprocess.run(
        [SCRIPT, "--seeds", "2"], env={**PLAIN, **environment}, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out/table.md").read_text()
    assert all(way in table for way in WAYS | CAPTIONED) and "standard error" in table
    assert os.access(SCRIPT, os.X_OK)
