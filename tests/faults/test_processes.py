"""Processes that are stopped, killed or start twice: every rank ends, one line says why, and the run goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import retrieval
from datasets.place import Place
from datasets.sampler import ResumableSampler
from engine.locks import NAME, FolderLock
from tests.processes import PLAIN, error_line
from tests.test_finetuning import CONFIG, changed, options, public, trunk, tuned  # noqa: F401

pytestmark = pytest.mark.multiprocess


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN, text=True
    )


def ended(process, seconds=60):
    """The exit code, and what was on stderr, of a process that must end by itself."""
    try:
        _, heard = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, heard


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


def steps_done(folder):
    file = folder / "log.csv"
    return file.read_text().count(",loss,") if file.is_file() else 0


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def long(tmp_path):
    """A configuration that takes a while, and logs each step."""
    return changed(tmp_path, scheduler={"epochs": 12}, log_every=1, save_every=100)


# Stopped by a scheduler


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [("SIGTERM", 1), ("SIGUSR1", 1), ("SIGTERM", 2)])
def test_a_signal_saves_the_step_and_ends_with_code_3(tmp_path, trunk, long, injected, name, devices):  # noqa: F811
    injected(f"{name}, {devices} rank{'s' * (devices > 1)}")
    more = ["--skip_eval", "-d", str(devices)]
    folder = tmp_path / "cut"
    process = start("retrieval.py", *options(folder, trunk, *more, config=long))
    wait_for(lambda: steps_done(folder) > 5, process)
    process.send_signal(getattr(signal, name))
    code, heard = ended(process)
    assert (
        code == 3
        and re.search(rf"stopped by ({name}|a signal) after step", heard)
        and "the same command goes on" in heard
    ), heard
    assert "Traceback" not in heard and not (folder / NAME).exists()
    code, heard = ended(start("retrieval.py", *options(folder, trunk, *more, config=long)), 180)
    assert code == 0, heard
    if devices == 1:
        whole = tuned(tmp_path / "whole", trunk, "--skip_eval", config=long)
        weights = "model.safetensors"
        assert (folder / "result" / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_the_first_validation_costs_nothing(tmp_path, trunk, injected, kind):  # noqa: F811
    """The epoch before it is saved when it begins."""
    injected(f"{kind.name} in the first validation")
    config = changed(tmp_path, bundled={"val_scenes": 3000}, log_every=1)
    folder = tmp_path / "out"
    process = start("retrieval.py", *options(folder, trunk, config=config))
    wait_for(lambda: (folder / "last.pt").is_file(), process)
    process.send_signal(kind)
    code, heard = ended(process)
    assert code == (3 if kind == signal.SIGTERM else -signal.SIGKILL), heard
    process = start("retrieval.py", *options(folder, trunk, config=config))
    before = steps_done(folder)
    assert before == 4, "the steps of the epoch"
    try:
        time.sleep(6)
        assert steps_done(folder) == before, "no step is done again: it validates"
    finally:
        process.kill()
        process.communicate()


# Killed


@pytest.mark.slow
def test_a_killed_data_worker(tmp_path, trunk, public, injected):  # noqa: F811
    injected("a data worker killed")
    config = {**public[1], "workers": 1, "scheduler": {"sched": "linear", "epochs": 200}, "log_every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "out"
    process = start("retrieval.py", *options(folder, trunk, "--skip_eval", config=tmp_path / "c.yaml"))
    wait_for(lambda: steps_done(folder) > 2 and children(process), process)
    os.kill(children(process)[-1], signal.SIGKILL)
    code, heard = ended(process)
    assert code == 4 and "a process that reads data was killed" in error_line(heard), heard


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other(tmp_path, trunk, long, injected, rank):  # noqa: F811
    injected(f"rank {rank} of 2 killed")
    folder = tmp_path / "out"
    process = start("retrieval.py", *options(folder, trunk, "--skip_eval", "-d", "2", config=long))
    wait_for(lambda: steps_done(folder) > 2, process)
    other = next(pid for pid in children(process) if b"retrieval.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(other if rank else process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 40
    while alive(other) or process.poll() is None:
        assert time.monotonic() < deadline, "a rank waits for one that is gone"
        time.sleep(0.1)
    heard = process.communicate()[1]
    assert "Traceback" not in heard, heard
    assert process.returncode in ((4, -signal.SIGKILL) if rank else (-signal.SIGKILL,))


@pytest.mark.slow
def test_a_bad_image_on_rank_1(tmp_path, trunk, public, injected):  # noqa: F811
    injected("an unreadable image on rank 1 of 2")
    folder, config = public
    records = json.loads(Path(config["train_file"][0]).read_text())
    sampler = ResumableSampler(len(records), seed=42, batch_size=2, place=Place(1, 2))
    image = Path(config["image_root"]) / records[next(iter(sampler)) % len(records)]["image"]
    before = image.read_bytes()
    assert Image.open(image)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"max_skipped": 0, "log_every": 1}))
    try:
        image.write_bytes(b"no image")
        given = options(tmp_path / "out", trunk, "--skip_eval", "-d", "2", config=tmp_path / "c.yaml")
        code, heard = ended(start("retrieval.py", *given))
    finally:
        image.write_bytes(before)
    told = error_line(heard)
    assert code == 2 and told.startswith("error (rank 1): ") and "cannot be read" in told


# Twice in one folder


@pytest.mark.script
def test_a_folder_has_one_run(tmp_path, trunk, capsys, injected):  # noqa: F811
    injected("a second run in the same folder")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, env=PLAIN)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"another run is writing here \(process {holder.pid} on "):
        retrieval.main(options(tmp_path / "out", trunk))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {NAME}
    holder.kill()
    holder.wait()
    retrieval.main(options(tmp_path / "out", trunk, "--debug", "--skip_eval"))  # the holder is gone
    assert not (tmp_path / "out" / NAME).exists()


HOLD = """
import sys, time
from pathlib import Path
from engine.locks import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_two_runs_that_begin_together(tmp_path, trunk, injected):  # noqa: F811
    injected("two runs begin together")
    for folder in (tmp_path / "out",):
        pair = [start("retrieval.py", *options(folder, trunk, "--debug", "--skip_eval")) for _ in range(2)]
        codes = sorted((ended(process) for process in pair), key=lambda one: one[0])
        if codes[1][0] == 0:  # one after the other: the second found a finished run
            continue
        assert [code for code, _ in codes] == [0, 2] and "another run is writing here" in error_line(codes[1][1])
        assert (folder / "result" / "README.md").is_file()


def test_what_a_killed_run_has_half_written_goes_with_the_next_one(tmp_path, injected):
    """But nothing of a run that is still there."""
    injected("killed while it writes a picture")
    half = tmp_path / ".sparsity.png.tmp-1-0123abcd"
    half.touch()
    there = {"host": "elsewhere", "boot": "b", "pid": 1, "began": "1", "since": "yesterday"}
    (tmp_path / NAME).write_text(json.dumps(there))
    with pytest.raises(ValueError, match="another run is writing here"):
        FolderLock(tmp_path)
    assert half.exists()
    (tmp_path / NAME).unlink()
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_cut_short_or_is_of_another_boot_is_taken_over(tmp_path):
    for content in ("", '{"host": "x"', json.dumps({"host": "elsewhere"})):
        (tmp_path / NAME).write_text(content)
        FolderLock(tmp_path).release()
        assert not list(tmp_path.iterdir())


def test_a_holder_on_another_machine_is_gone_when_it_is_silent(tmp_path):
    there = {"host": "elsewhere", "boot": "b", "pid": 1, "began": "1", "since": "yesterday"}
    (tmp_path / NAME).write_text(json.dumps(there))
    with pytest.raises(ValueError, match="process 1 on elsewhere, since yesterday"):
        FolderLock(tmp_path)
    os.utime(tmp_path / NAME, (time.time() - 3600,) * 2)
    FolderLock(tmp_path).release()
