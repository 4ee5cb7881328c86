"""The disk is full, or a limit is reached, while each kind of file is written: one line, exit code 4, no partial file,
and the same command then ends with the same bits as a run without the fault.
"""

import os
import subprocess
import sys

import pytest

import compare
import maskllm_train
import prune
import retrieval
import sparsity.files
import sparsity.statistics.row_stores
from engine.launch import run
from tests.faults.injection import Limit
from tests.test_finetuning import options as tuning_options
from tests.test_finetuning import trunk  # noqa: F401
from tests.test_maskllm_train import options as learning_options
from tests.test_maskllm_train import photos  # noqa: F401
from tests.test_scripts import CONFIGS, PLAIN, no_pictures, prune_options  # noqa: F401

pytestmark = pytest.mark.script


@pytest.fixture(scope="module")
def commands(trunk, photos):  # noqa: F811
    """Task -> main, and its arguments for a folder."""

    def pruning(pruner, *more):
        return prune.main, lambda folder: prune_options(folder, pruner, "-s", "63", *more)

    compared = ["-m", "xvlm", "-p", "omp", "-s", "63", "--seeds", "1", "--config", str(CONFIGS / "prune.yaml")]
    return {
        "fine-tuning": (retrieval.main, lambda folder: tuning_options(folder, trunk)),
        "mask training": (maskllm_train.main, lambda folder: learning_options(photos, folder, "--mask-only")),
        "pruning": pruning("multiflow", "--save_scores", "--save_model"),
        "chita": pruning("chita", "--memory_budget", "1KB", "--num_batches", "2"),
        "sparsegpt": pruning("sparsegpt", "--enable_update", "--num_batches", "2"),
        "comparing": (compare.main, lambda folder: [*compared, "--accelerator", "cpu", "--output_dir", str(folder)]),
    }


VARIES = ("README.md", "config.yaml", "report.json", "report.md", "runtimes.csv", "results.csv", "log.csv", "last.pt")
# They have times and paths.


def results(folder):
    """Return what must be the same, bit for bit, and the names of all files."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    exact = {name: path.read_bytes() for name, path in files.items() if path.suffix == ".safetensors"}
    return exact, set(files)


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """The results of a run without a fault, each made once."""
    made = {}

    def find(task):
        if task not in made:
            folder = tmp_path_factory.mktemp("whole")
            main, arguments = commands[task]
            main(arguments(folder))
            made[task] = results(folder)
        return made[task]

    return find


def limited(monkeypatch, *limit):
    fault = Limit(*limit)
    for module in (sparsity.files, sparsity.statistics.row_stores):
        monkeypatch.setattr(module, "writing", fault)
    return fault


QUICK = [("fine-tuning", "best.pt", 100, 1), ("pruning", "*_pruning_masks.safetensors", 100, 1)]
SLOW = [
    ("fine-tuning", "last.pt", 0, 1),
    ("fine-tuning", "last.pt", 10_000, 4),
    ("fine-tuning", "log.csv", 0, 1),
    ("fine-tuning", "log.csv", 30, 3),
    ("fine-tuning", "config.yaml", 100, 1),
    ("fine-tuning", "model.safetensors", 1000, 1),
    ("fine-tuning", "mask.safetensors", 0, 1),
    ("fine-tuning", "metrics.json", 0, 1),
    ("fine-tuning", "README.md", 0, 1),
    ("mask training", "last.pt", 1000, 2),
    ("mask training", "model_best.pth.tar", 1000, 1),
    ("mask training", "model.safetensors", 0, 1),
    ("mask training", "mask.safetensors", 0, 1),
    ("mask training", "metrics.json", 0, 1),
    ("pruning", "*_model.safetensors", 1000, 1),
    ("pruning", "*_scores.safetensors", 1000, 1),
    ("pruning", "report.md", 0, 1),
    ("pruning", "runtimes.csv", 0, 1),
    ("pruning", "config.yaml", 0, 1),
    ("chita", "*.rows", 1000, 1),
    ("chita", "*_weights.safetensors", 1000, 1),
    ("sparsegpt", "*.block*", 1000, 2),
    ("comparing", "results.csv", 0, 2),
    ("comparing", "table.md", 0, 1),
]


@pytest.mark.parametrize(
    ("task", "name", "size", "first"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_full_disk(tmp_path, monkeypatch, capfd, commands, whole, injected, task, name, size, first):
    expected, folder = whole(task), tmp_path / "out"
    main, arguments = commands[task]
    injected(f"disk full, {task}: {name}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        fault = limited(patch, name, size, first)
        capfd.readouterr()
        run(lambda: main(arguments(folder)))
    told = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert fault.times == first and ended.value.code == 4
    assert told.startswith("error: ") and "cannot be written (File too large)" in told and "Traceback" not in told
    assert not list(tmp_path.rglob("*.tmp-*")) and not list(tmp_path.rglob("running.lock"))
    main(arguments(folder))
    assert results(folder) == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fine-tuning", "mask training", "pruning"])
def test_a_file_system_without_room(small_disk, commands, injected, capfd, task):
    main, arguments = commands[task]
    injected(f"tmpfs without room: {task}")
    (small_disk / "ballast").write_bytes(bytes(300_000))
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(arguments(small_disk / "out")))
    told = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert ended.value.code == 4 and "(No space left on device)" in told
    assert not list(small_disk.rglob("*.tmp-*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_failing_write_of_the_leader_ends_all_ranks(tmp_path, trunk, injected):  # noqa: F811
    injected("disk full on the leader of 2 ranks")
    command = [sys.executable, "-m", "tests.faults.injection", "best.pt", "100", "1", "retrieval.py"]
    given = tuning_options(tmp_path / "out", trunk, "-d", "2")
    done = subprocess.run([*command, *given], capture_output=True, text=True, env=PLAIN, timeout=120)
    told = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert done.returncode == 4 and len(told) == 1 and "best.pt: cannot be written" in told[0], done.stderr[-3000:]
    assert "Traceback" not in done.stderr
