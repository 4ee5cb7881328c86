"""scripts/finetune_mini.sh: what it runs, that it runs nothing twice, and its table."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import compare
from engine.finished.finetuning_table import read_metrics, table
from tests.processes import PATIENCE, PLAIN
from tests.test_scripts import CONFIGS, refused

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.script, pytest.mark.skipif(not shutil.which("bash"), reason="bash is needed")]

# In place of python: writes down its arguments, and leaves the results that the script looks for.
STUB = """#!{python}
import json, pathlib, sys
given = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(given) + "\\n")
at = lambda name: given[given.index(name) + 1]
if "--stop" in {stop!r} and given[0] == {stop!r}[-1]:
    sys.exit(2)
if given[0] == "prune.py":
    for s in at("-s").split(","):
        path = pathlib.Path(at("--output_dir"), "multiflow", at("-m") + "_multiflow_" + s
                            + "_seed42_pruning_masks.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
elif given[0] != "compare.py":
    result = pathlib.Path(at("--output_dir"), "result")
    result.mkdir(parents=True, exist_ok=True)
    (result / "README.md").touch()
"""


@pytest.fixture
def recipe(tmp_path):
    """Runs the script with the stub; the commands that it gave."""

    def run(stop="", code=0, **environment):
        log, stub = tmp_path / "log", tmp_path / "python"
        log.write_text("")
        stops = ["--stop", stop] if stop else []
        stub.write_text(STUB.format(python=sys.executable, log=str(log), stop=stops))
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
        given = {**PLAIN, "PYTHON": str(stub), "OUTPUT": str(tmp_path / "out"), "JOBS": "1", **environment}
        done = subprocess.run([ROOT / "scripts/finetune_mini.sh"], env=given, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


def test_it_prunes_each_model_once_and_tunes_every_task_at_every_level(tmp_path, recipe):
    commands = recipe()
    pruned = [command for command in commands if command[0] == "prune.py"]
    assert [command[2] for command in pruned] == ["xvlm", "blip", "dino"]
    assert all(command[command.index("-s") + 1] == "63,75,90" for command in pruned)
    tuned = [command for command in commands if command[0] not in ("prune.py", "compare.py")]
    assert len(tuned) == 7 * 4
    seen = set()
    for command in tuned:
        assert (ROOT / command[0]).is_file() and (ROOT / command[command.index("--config") + 1]).is_file()
        model, folder = command[2], Path(command[command.index("--output_dir") + 1])
        task, level = folder.parent.name, folder.name
        assert task == f"{model}_{command[0].removesuffix('.py')}"
        assert ("--dense" in command) == (level == "dense") != ("--mask" in command)
        if level != "dense":
            mask = Path(command[command.index("--mask") + 1])
            assert mask.is_file() and mask.name == f"{model}_multiflow_{level}_seed42_pruning_masks.safetensors"
        seen.add((task, level))
    assert len(seen) == len(tuned) and {level for _, level in seen} == {"dense", "63", "75", "90"}
    assert commands[-1][:2] == ["compare.py", "--finetuned"]
    assert not any("--debug" in command for command in commands)


def test_what_is_finished_is_not_done_again(tmp_path, recipe):
    stopped = recipe(stop="vqa.py", code=1)
    assert stopped[-1][0] == "vqa.py" and not any(command[0] == "compare.py" for command in stopped)
    done = [command for command in stopped[:-1] if command[0] != "prune.py"]
    rest = recipe()
    assert not [command for command in rest if command in done]
    assert len([command for command in rest if command[0] not in ("prune.py", "compare.py")]) == 28 - len(done)
    assert [command[0] for command in recipe()] == ["compare.py"]


def test_several_at_a_time(tmp_path, recipe):
    alone = recipe()
    shutil.rmtree(tmp_path / "out")
    together = recipe(JOBS="3")
    assert sorted(together) == sorted(alone) and together[-1] == alone[-1]


def test_a_part_of_it_at_debug_sizes(recipe):
    commands = recipe(DEBUG="1", RUNS="blip_vqa dino_image_classification", SPARSITIES="50,60")
    assert len(commands) == 2 + 2 * 3 + 1
    assert all("--debug" in command for command in commands if command[0] in ("vqa.py", "image_classification.py"))


@pytest.mark.slow
def test_it_runs(tmp_path):
    """Really, on the two-layer model."""
    configs = tmp_path / "configs" / "dino"
    configs.mkdir(parents=True)
    shutil.copy(CONFIGS / "dino_prune.yaml", configs / "prune_mini.yaml")
    shutil.copy(CONFIGS / "dino_image_classification.yaml", configs / "image_classification_mini.yaml")
    environment = {"PYTHON": sys.executable, "OUTPUT": str(tmp_path / "out"), "CONFIGS": str(tmp_path / "configs")}
    environment |= {"RUNS": "dino_image_classification", "SPARSITIES": "50", "DEBUG": "1"}
    command = [ROOT / "scripts/finetune_mini.sh"]
    done = subprocess.run(command, env={**PLAIN, **environment}, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| dino_image_classification")]
    assert [re.split(r" *\| *", row)[2:4] for row in rows] == [["seen", "top1"], ["unseen", "top1"]]
    assert "\n".join(rows) in (tmp_path / "out" / "table.md").read_text()
    assert set(read_metrics(tmp_path / "out")["dino_image_classification"]) == {"dense", "50"}


def test_the_script_can_be_started():
    subprocess.run(["bash", "-n", ROOT / "scripts/finetune_mini.sh"], check=True)
    assert os.access(ROOT / "scripts/finetune_mini.sh", os.X_OK)


# The table


def put(folder, content):
    (folder / "result").mkdir(parents=True)
    (folder / "result/metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    put(tmp_path / "a_vqa" / "90", {"test": {"accuracy": 10.04, "accuracy_count": 3}})
    put(tmp_path / "a_vqa" / "dense", {"test": {"accuracy": 70.06, "accuracy_count": 4}})
    put(tmp_path / "a_vqa" / "7.5", {"test": {"accuracy": 60.0, "accuracy_count": 5}})
    put(tmp_path / "b_captioning" / "dense", {"test": {"cider": 100.0}})
    put(tmp_path / "b_captioning" / "90", {})  # without evaluation
    return tmp_path


def test_the_table_has_a_column_for_each_sparsity_in_order(runs, capsys):
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table(runs).splitlines()]
    assert rows[0] == ["task", "test", "metric", "dense", "7.5 %", "90 %"]
    assert rows[2:] == [
        ["a_vqa", "test", "accuracy", "70.1", "60.0", "10.0"],
        ["a_vqa", "test", "accuracy_count", "4.0", "5.0", "3.0"],
        ["b_captioning", "test", "cider", "100.0", "-", "-"],
    ]
    compare.main(["--finetuned", str(runs), "--metrics", "accuracy,cid*"])
    printed = capsys.readouterr().out
    assert "accuracy_count" not in printed and printed.endswith(f"results: {runs}/table.md\n")
    assert printed.partition("\n\n")[0] in (runs / "table.md").read_text()


def test_what_cannot_be_put_in_a_table(runs, capsys):
    assert "there is none; fine-tune first" in refused(capsys, compare.main, ["--finetuned", str(runs / "nowhere")])
    assert "no run has the metric top1 or x*" in refused(
        capsys, compare.main, ["--finetuned", str(runs), "--metrics=top1,x*"]
    )
    put(runs / "a_vqa" / "most", {"test": {}})
    assert "most/result/metrics.json: expected <run>/dense" in refused(capsys, compare.main, ["--finetuned", str(runs)])
    shutil.rmtree(runs / "a_vqa" / "most")
    for i, content in enumerate(("{", "[]", '{"test": 3}', '{"test": {"accuracy": "high"}}')):
        put(runs / "c" / str(i), content)
        assert f"c/{i}/result/metrics.json: not the metrics of tests" in refused(
            capsys, compare.main, ["--finetuned", str(runs)]
        )
        shutil.rmtree(runs / "c")
    assert not (runs / "table.md").exists()
