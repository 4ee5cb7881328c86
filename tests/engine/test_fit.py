"""The training loop: a resumed run equals an uninterrupted one, bit for bit."""

import csv
import itertools

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from engine.fit import Run, fit
from engine.optimizer import adamw, muon

STEPS = 13
OPTIMIZERS = {
    "adamw": lambda model: adamw(model, lr=0.1, weight_decay=0.01, betas=(0.9, 0.98)),
    "muon": lambda model: muon(model, lr=0.1, matrix_lr=0.05, weight_decay=0.01, betas=(0.9, 0.98)),
}


class Model(nn.Module):
    """Has dropout, and a second loss on some steps only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x, step):
        losses = {"fit": (self.layers(x) - 1).square().mean()}
        if step % 3 == 0:
            losses["size"] = self.layers[0].weight.square().mean()
        return {"loss": sum(losses.values()), **losses}


class Killed(BaseException):
    pass


def batches(start, killed_at=None):
    for step in itertools.count(start):
        if step == killed_at:
            raise Killed
        yield {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(step)), "step": step}


def make(folder, optimizer="adamw", **options):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Model()
    model, optimizer = fabric.setup(model, OPTIMIZERS[optimizer](model))
    options = {"identity": {"training": {"lr": 0.1}}, "seed": 3, "log_every": 2, "save_every": 3} | options
    return Run(fabric, model, optimizer, lambda step: 1 / (1 + step), STEPS, folder, **options)


def train(run, killed_at=None):
    start = run.resume()
    fit(run, batches(start, killed_at), start)
    return run


def rows(folder):
    """The log without its seconds."""
    with (folder / "log.csv").open(newline="") as file:
        return [(step, name, value) for step, _, name, value in csv.reader(file)]


def same(a, b):
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(a.optimizer.state_dict(), b.optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_equals_uninterrupted(tmp_path, optimizer):
    options = {"optimizer": optimizer, "validate": lambda: {"r": 1.0}, "validate_every": 4}
    whole = train(make(tmp_path / "whole", **options))
    for killed_at in (8, 12):  # between two checkpoints: steps were done and logged that are done again
        with pytest.raises(Killed):
            train(make(tmp_path / "cut", **options), killed_at)
    assert rows(tmp_path / "cut")[-1][0] == "12"
    cut = train(make(tmp_path / "cut", **options))
    same(whole, cut)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert cut.resume() == STEPS


def test_a_kill_before_the_first_checkpoint_starts_again(tmp_path):
    with pytest.raises(Killed):
        train(make(tmp_path / "cut"), killed_at=2)
    same(train(make(tmp_path / "cut")), train(make(tmp_path / "whole")))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = train(make(tmp_path))
    before = rows(tmp_path)
    same(train(make(tmp_path)), run)
    assert rows(tmp_path) == before


def test_log_rows(tmp_path):
    train(make(tmp_path, validate=lambda: {"r_mean": 12.5}, validate_every=5))
    header, *logged = rows(tmp_path)
    assert header == ("step", "name", "value")
    steps = [int(step) for step, _, _ in logged]
    assert steps == sorted(steps)
    assert sorted({s for s, (_, name, _) in zip(steps, logged, strict=True) if name == "fit"}) == [
        step for step in range(1, STEPS + 1) if step % 2 == 0 or step % 3 == 0 or step == STEPS
    ]
    assert [(s, v) for s, name, v in logged if name == "validation/r_mean"] == [
        ("5", "12.5"), ("10", "12.5"), ("13", "12.5")
    ]  # fmt: skip
    assert {name for _, name, _ in logged} == {"loss", "fit", "size", "norm", "lr", "validation/r_mean"}


def test_a_log_cut_within_a_row_is_mended(tmp_path):
    train(make(tmp_path))
    before = rows(tmp_path)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("15,3,lo")
    train(make(tmp_path))
    assert rows(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"identity": {"training": {"lr": 0.2}}}, "training.lr 0.1 -> 0.2"),
        ({"identity": {"training": {"lr": 0.1}, "devices": 2}}, "devices None -> 2"),
    ],
)
def test_another_configuration_is_refused(tmp_path, options, told):
    train(make(tmp_path))
    content = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=f"last.pt: belongs to a run of another configuration \\({told}\\); choose"):
        make(tmp_path, **options).resume()
    assert (tmp_path / "last.pt").read_bytes() == content


def test_a_strange_checkpoint_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="last.pt: not a checkpoint of a training run, it has no 'step'"):
        make(tmp_path).resume()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    run = make(tmp_path)
    start = run.resume()

    def spoilt():
        for step, batch in enumerate(batches(start)):
            yield batch | ({"x": batch["x"] * torch.nan} if step == 7 else {})

    with pytest.raises(ValueError, match="the loss is nan at step 8"):
        fit(run, spoilt(), start)
    fresh = make(tmp_path)
    assert fresh.resume() == 6
    assert all(t.isfinite().all() for t in fresh.model.state_dict().values())


def test_batches_that_end_early_are_a_bug(tmp_path):
    run = make(tmp_path)
    with pytest.raises(AssertionError, match="ended at step 4 of 13"):
        fit(run, itertools.islice(batches(0), 4), 0)


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".last.pt.tmp-x1").write_bytes(b"half")
    train(make(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "log.csv"]


def test_the_rate_is_a_function_of_the_step(tmp_path):
    train(make(tmp_path))
    logged = [(int(s), float(v)) for s, name, v in rows(tmp_path)[1:] if name == "lr"]
    assert logged == [(s, pytest.approx(0.1 / s, rel=1e-5)) for s, _ in logged]
