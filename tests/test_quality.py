"""scripts/quality.sh: what it runs, that it runs nothing twice, and its tables, curves and verdicts."""

import csv
import json
import math
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from configs.loading import read_yaml
from engine.finished.quality_table import difference, read_studies, verdict
from tests.processes import PLAIN
from tests.test_scripts import refused

pytestmark = pytest.mark.script

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ("xvlm", "xvlm_towers", "blip", "blip_contrastive", "vit", "dit")

# In place of python: writes down its arguments; fails where they hold a text.
STUB = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(2 if {stop!r} and {stop!r} in " ".join(sys.argv) else 0)
"""


@pytest.fixture
def recipe(tmp_path):
    """Runs the script with the stub; the commands that it gave."""

    def run(*options, stop="", code=0, **environment):
        log, stub = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        stub.write_text(STUB.format(python=sys.executable, log=str(log), stop=stop))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        given = {**PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1", **environment}
        done = subprocess.run([ROOT / "scripts/quality.sh", *options], env=given, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


def at(command, name):
    return command[command.index(name) + 1]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_every_plan_of_every_model_once(tmp_path, recipe):
    stopped = recipe(stop="vit/sparsegpt", code=1)
    assert "vit/sparsegpt" in " ".join(stopped[-1])
    commands = [*stopped[:-1], *recipe()]
    assert commands[-1] == ["compare.py", "--quality", str(tmp_path / "out")]
    assert len({json.dumps(command) for command in commands}) == len(commands)
    assert recipe() == [commands[-1]], "all is done"
    assert len(recipe(LEVELS="75", STUDIES="vit")) == len(recipe(LEVELS="63", STUDIES="vit")) > 2, "another command"
    plans, asked = read_yaml(ROOT / "configs/quality/plans.yaml"), {}
    for script, *arguments in commands[:-1]:
        args = compare.parse(arguments)
        names = args.pruners.split(",")
        study, plan = args.output_dir.parts[-2:]
        assert script == "compare.py" and {*names} <= {*plans}
        assert args.seeds == [42, 43, 44] and args.num_batches == (64 if study[:4] in ("xvlm", "blip") else 32)
        levels = ("75", []) if study[:4] == "blip" else ("50,63,75,90", [f"{plan} 2:4"])
        assert names == ([] if study == "dit" else [plan]) + levels[1]
        assert study == "dit" or args.sparsities == levels[0]
        assert args.int8 == (plan in ("wanda", "magnitude"))
        asked.setdefault(study, []).append(plan)
    assert {*asked} == {*STUDIES} and all(len(names) == len({*names}) <= 6 for names in asked.values())


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_what_is_asked_for_behind_flags(tmp_path, recipe):
    options = ("--accelerator", "cpu")
    commands = recipe(*options, STUDIES="vit", PLANS="sparsegpt", LEVELS="75", SEEDS="1,2", GRID="1", SAMPLES="1")
    assert all(command[-2:] == list(options) for command in commands[:-1])
    found = {Path(at(command, "--output_dir")).parts[-2:]: command for command in commands[:-1]}
    assert {study for study, _ in found} == {"vit", "grid", "samples_32", "samples_128"}
    assert at(found["vit", "sparsegpt"], "-p") == "sparsegpt" and at(found["vit", "sparsegpt"], "-s") == "75"
    assert [at(found[f"samples_{n}", "sparsegpt"], "--num_batches") for n in (32, 128)] == ["2", "8"]
    grid = read_yaml(tmp_path / "out/grid.yaml")
    asked = [name for (study, _), c in found.items() if study == "grid" for name in at(c, "-p").split(",")]
    assert sorted(asked) == sorted(grid) and at(found["grid", "wanda"], "--seeds") == "1"
    assert {plan["reconstruct"] for plan in grid.values()} == {"none", "sparsegpt", "lsq", "admm"}
    (debug, _) = recipe(DEBUG="1", STUDIES="xvlm", PLANS="magnitude")
    assert (at(debug, "-p"), at(debug, "--seeds"), at(debug, "--num_batches")) == ("magnitude", "42", "2")
    assert recipe(STUDIES="vti", code=2) == []


# Tables


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")
def test_allocations_and_budgets_behind_flags(recipe):
    *commands, _ = recipe(STUDIES="", ALLOCATIONS="1", BUDGETS="1")
    asked = {}
    for _, *arguments in commands:
        args = compare.parse(arguments)
        study = args.output_dir.parent.name
        assert args.pruners in read_yaml(args.plans), "a plan of its file"
        asked.setdefault((study, args.sparsities, len(args.seeds)), []).append(args.pruners)
    shared = [("vit_allocations", "63,75,90", 3), ("xvlm_allocations", "63,75,90", 3)]
    budgets = [(f"{model}_budgets", level, 1) for model in ("xvlm", "blip") for level in ("75", "90")]
    assert {*asked} == {*shared, *budgets}
    assert all({*asked[key]} == {*read_yaml(ROOT / "configs/quality/allocations.yaml")} for key in shared)
    assert all(len(asked[key]) == 5 for key in budgets)


def test_plans_that_have_a_level_each_are_drawn_side_by_side(tmp_path):
    for plan, level in (("vision70", "75"), ("vision75", "75"), ("vision88", "90")):
        write(tmp_path, "xvlm_budgets", plan, [(plan, level, "42", 1, {"top-1": 9.0})])
    compare.main(["--quality", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"xvlm_budgets_75.png", "xvlm_budgets_90.png"}


COSTS = {"calibration_seconds": 1.0, "peak_mb": 100}


def write(folder, study, plan, rows):
    """rows: (pruner, sparsity, seed, selection seconds, value of each column of a measure)."""
    path = folder / study / plan / "results.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = None
        for pruner, sparsity, seed, seconds, values in rows:
            row = {"config": f"of {pruner}", "date": "now", "pruner": pruner, "sparsity": sparsity, "seed": seed}
            row |= values | COSTS | {"selection_seconds": seconds}
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def top1(*values):
    return [{"top-1": value} for value in values]


@pytest.fixture
def made(tmp_path):
    """A study of three plans at two levels; "slow" is ahead of "fast" by 1.0 ± 0.1 at 75 %, by noise at 2:4."""
    dense = [("dense", "0", "-", 0, {"top-1": 60.0}), ("dense int8", "0", "-", 0, {"top-1": 59.5})]
    fast = [("fast", "75", s, 2, v) for s, v in zip("123", top1(40.0, 42.0, 44.0), strict=True)]
    fast += [("fast 2:4", "2:4", s, 2, v) for s, v in zip("123", top1(50.0, 53.0, 50.0), strict=True)]
    slow = [("slow", "75", s, 9, v) for s, v in zip("123", top1(41.1, 43.0, 44.9), strict=True)]
    slow += [("slow 2:4", "2:4", s, 9, v) for s, v in zip("123", top1(51.0, 51.0, 52.0), strict=True)]
    write(tmp_path, "vit", "fast", [*dense, *fast])
    write(tmp_path, "vit", "slow", [*dense[:1], *slow])
    write(tmp_path, "vit", "plain", [*dense[:1], ("plain", "75", "-", 0, {"top-1": 9.0})])
    return tmp_path


def test_means_errors_and_costs(made, capsys):
    compare.main(["--quality", str(made)])
    told = capsys.readouterr().out
    cells = [re.split(r" *\| *", line.strip("| ")) for line in told.splitlines() if line.startswith("|")]
    assert cells[0] == ["plan", "2:4", "75 %", "seconds", "MB"]
    assert cells[2:7] == [
        ["dense", "60.0", "60.0", "-", "-"],
        ["dense int8", "59.5", "59.5", "-", "-"],
        ["plain", "-", "9.0", "1.0", "100"],
        ["fast", "51.0 ± 1.0", "42.0 ± 1.2", "3.0", "100"],  # 2 / sqrt(3)
        ["slow", "51.3 ± 0.3", "43.0 ± 1.1", "10.0", "100"],
    ]
    assert told.strip().endswith(f"results: {made / 'table.md'}")
    assert "| slow " in (made / "table.md").read_text()
    assert all((made / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("vit", "quality"))
    with (made / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 1 + 1 + 1 + 1 + 12 and {row["config"] for row in rows} >= {"of fast", "of fast 2:4"}
    assert [row["value"] for row in rows if (row["plan"], row["sparsity"], row["seed"]) == ("slow", "2:4", "3")] == [
        "52.0"
    ]


def test_the_cheaper_plan_is_taken_within_two_standard_errors(made):
    (study,) = read_studies(made)
    assert study.levels == ["2:4", "75"]
    at_75, at_24 = (verdict(study, level) for level in ("75", "2:4"))
    assert (at_75["best"], at_75["take"], at_75["behind by"]) == ("slow", "slow", "-")
    assert (at_24["best"], at_24["take"], at_24["behind by"]) == ("slow", "fast", "0.3 ± 1.2")


def test_differences_are_paired_over_seeds():
    one, other = {"1": 5.0, "2": 7.0, "3": 9.0}, {"2": 6.5, "1": 4.0, "4": 0.0}
    mean, error = difference(one, other)
    assert mean == pytest.approx(0.75) and error == pytest.approx(0.25)
    mean, error = difference(one, {"-": 6.0})
    assert mean == pytest.approx(1.0) and error == pytest.approx(2 / math.sqrt(3))
    assert difference({"-": 6.0}, one) == pytest.approx((-1.0, 2 / math.sqrt(3)))
    assert difference({"-": 6.0}, {"-": 4.0}) == (2.0, 0.0)
    assert difference({"1": 6.0}, {"2": 4.0}) == (2.0, math.inf)


def test_retrieval_is_judged_by_both_ways_and_a_distance_by_the_lowest(tmp_path):
    def recalls(i2t, t2i):
        return {"i2t R@1": i2t, "t2i R@1": t2i}

    write(tmp_path, "xvlm", "a", [("a", "75", s, 1, recalls(70, 50 + i)) for i, s in enumerate("123")])
    write(tmp_path, "xvlm", "b", [("b", "75", s, 1, recalls(60, 66 + i)) for i, s in enumerate("123")])
    for plan, value in (("near", 40.0), ("far", 60.0)):
        values = [{"Frechet": value + i, "as asked %": 9.0} for i in range(3)]
        write(tmp_path, "dit", plan, [(f"{plan} 2:4", "2:4", str(i), 1, v) for i, v in enumerate(values)])
    dit, xvlm = read_studies(tmp_path)
    assert verdict(xvlm, "75")["best"] == "b"
    assert (verdict(dit, "2:4")["best"], verdict(dit, "2:4")["take"]) == ("near", "near")


def test_rows_of_earlier_configurations_do_not_count(tmp_path):
    write(tmp_path, "vit", "a", [("a", "75", "1", 1, {"top-1": 10.0})])
    path = tmp_path / "vit/a/results.csv"
    (line,) = path.read_text().splitlines()[1:]
    path.write_text(path.read_text() + line.replace("of a", "new").replace("10.0", "20.0") + "\n")
    (study,) = read_studies(tmp_path)
    assert study.plans[0].values == {"75": {"1": (20.0,)}}


def test_what_cannot_be_put_in_a_table(tmp_path, capsys):
    told = refused(capsys, compare.main, ["--quality", str(tmp_path)])
    assert "results.csv: there is none; scripts/quality.sh makes them" in told
    (tmp_path / "vit/a").mkdir(parents=True)
    (tmp_path / "vit/a/results.csv").write_text("a,b\n1,2\n")
    assert "a/results.csv: not the results of a comparison" in refused(
        capsys, compare.main, ["--quality", str(tmp_path)]
    )
    (tmp_path / "vit/a/results.csv").unlink()
    write(tmp_path, "vit", "b", [("b", "75", "1", 1, {"loss": 10.0})])
    assert "study 'vit': has none of the columns" in refused(capsys, compare.main, ["--quality", str(tmp_path)])
