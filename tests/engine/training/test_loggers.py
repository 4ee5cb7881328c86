"""Files and places that loggers write to, and that a resumed run goes on there."""

import csv
import sys
from types import SimpleNamespace

import pytest

from engine.options.command_line import check_loggers
from engine.training.loggers import CsvLog, TensorBoardLog, WandbLog


def rows(path):
    with path.open(newline="") as file:
        return [(step, name, value) for step, _, name, value in csv.reader(file)]


def test_csv_rows_beyond_the_checkpoint_are_removed(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 3})
    with path.open("a") as file:
        file.write("4,9,lo")  # cut within a row
    CsvLog(path, 2).write(3, {"loss": 7.0})
    assert rows(path)[1:] == [("1", "loss", "0.333333"), ("2", "loss", "0.666667"), ("3", "loss", "7")]


class FakeWandb:
    """Records what is asked of it; `init` raises `refusal` where there is one."""

    def __init__(self, refusal=None):
        self.begun, self.logged, self.finished, self.refusal = [], [], 0, refusal

    def init(self, **options):
        if self.refusal:
            raise self.refusal
        self.begun.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def begin(folder, offline=True):
    named = {"project": "p", "name": "n", "tags": ("t",), "config": {"lr": 0.1}}
    return WandbLog(folder, **named, offline=offline)


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        log = begin(tmp_path, offline=step == 1)
        log.write(step, {"loss": 0.5})
        log.close()
    first, second = fake.begun
    assert first["id"] == second["id"] and first["resume"] == "allow" and (tmp_path / "wandb_id.txt").is_file()
    assert (first["mode"], second["mode"]) == ("offline", "online")
    assert (first["project"], first["name"], first["tags"], first["dir"]) == ("p", "n", ["t"], tmp_path)
    assert fake.logged == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and fake.finished == 2
    begin(tmp_path / "other")
    assert fake.begun[-1]["id"] != first["id"]


def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no key\nconfigured")))
    with pytest.raises(ValueError, match="^--wandb: no key configured; or give --wdb_offline$"):
        begin(tmp_path)


def test_tensorboard_hides_what_a_killed_run_logged_beyond_its_checkpoint(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = TensorBoardLog(tmp_path, start)
        for step in steps:
            log.write(step, {"loss": float(10 * start + step)})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_only_what_is_wanted_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loggers({"wandb": False, "tensorboard": False})
    with pytest.raises(
        ValueError, match="--tensorboard needs a package that is not installed: pip install tensorboard"
    ):
        check_loggers({"wandb": False, "tensorboard": True})
