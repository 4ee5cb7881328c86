"""Scripts started from another folder: what comes with the repository is found, and results lie where they started."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.locations import ROOT, located

pytestmark = pytest.mark.script

COMMANDS = {
    "prune": (["-m", "xvlm", "-p", "omp", "-s", "63"], "pruned_weights/omp/report.md"),
    "oneshot_pruning_timm": (
        ["--model", "vit_mini", "--pruner", "wanda", "--nsamples", "4", "--skip-eval", "--save-model", "w.pt"],
        "w.pt",
    ),
    "sample": (["--num-samples", "2", "--num-sampling-steps", "2", "--output", "drawn.png"], "drawn.png"),
}


def test_paths_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    assert located("data/vocab/mini_vocab.txt") == "data/vocab/mini_vocab.txt"
    monkeypatch.chdir(tmp_path)
    assert located("data/vocab/mini_vocab.txt") == str(ROOT / "data/vocab/mini_vocab.txt")
    assert located(Path("images/cc3m/{00000..00009}.tar")) == ROOT / "images/cc3m/{00000..00009}.tar"
    assert located("output/x.pt") == "output/x.pt" and located("") == "" and located("/data/x") == "/data/x"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.json").touch()
    assert located("data/own.json") == "data/own.json"  # what lies in the working folder comes first


@pytest.mark.parametrize("script", COMMANDS)
def test_a_script_runs_from_another_folder(script, tmp_path):
    arguments, result = COMMANDS[script]
    command = [sys.executable, ROOT / f"{script}.py", *arguments, "--accelerator", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / result).is_file()
