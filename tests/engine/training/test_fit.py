"""The training loop: a resumed run equals an uninterrupted one, bit for bit."""

import csv
import itertools

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision.amp import MixedPrecision
from torch import nn

from engine.sparse_training.held import Held
from engine.training.fit import Run, fit
from engine.training.optimizer import adamw, muon
from sparsity.masks import Masks
from tests.toys import view_of

pytestmark = pytest.mark.script

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


# Accumulation


def split(parts, killed_at=None):
    """The batches of `batches`, each in `parts` parts."""
    for batch in batches(0, killed_at):
        for x in batch["x"].chunk(parts):
            yield {"x": x, "step": batch["step"]}


def linear(folder, **options):
    """A run without anything that depends on how a batch is divided: no dropout, no batch norm."""
    run = make(folder, **options)
    run.model.layers[1], run.model.layers[2] = nn.Identity(), nn.Identity()
    return run


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    whole = linear(tmp_path / "whole")
    fit(whole, batches(0), 0)
    parts = linear(tmp_path / "parts", accumulate=3)
    fit(parts, split(3), 0)
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=1e-4, atol=1e-6)
    logged = [{(s, name): float(value) for s, name, value in rows(tmp_path / f)[1:]} for f in ("whole", "parts")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


def test_resumed_equals_uninterrupted_with_accumulation(tmp_path):
    whole = make(tmp_path / "whole", accumulate=3)
    fit(whole, split(3), 0)
    cut = make(tmp_path / "cut", accumulate=3)
    with pytest.raises(Killed):
        fit(cut, split(3, killed_at=8), 0)
    cut = make(tmp_path / "cut", accumulate=3)
    start = cut.resume()
    assert start == 6
    fit(cut, itertools.islice(split(3), 3 * start, None), start)
    same(whole, cut)


def test_a_run_may_stop_early_and_go_on(tmp_path):
    run = make(tmp_path / "cut")
    fit(run, batches(0), 0, stop=5)
    run = make(tmp_path / "cut")
    assert run.resume() == 5
    fit(run, batches(5), 5)
    same(run, train(make(tmp_path / "whole")))


# The best weights


def scores(values):
    """A validation that returns these, and the weights of a run when it did."""
    remaining = iter(values)
    return lambda: {"r": next(remaining)}


def test_the_best_weights_are_kept_and_brought_back(tmp_path):
    weights = {}

    def validate():
        weights[len(weights)] = {k: v.clone() for k, v in run.model.state_dict().items()}
        return {"r": [1.0, 3.0, 2.0, 3.0][len(weights) - 1]}

    run = make(tmp_path, validate=validate, validate_every=4, select="r")
    train(run)
    assert run.best == {"step": 8, "value": 3.0}  # the first of equal ones
    run.load_best()
    torch.testing.assert_close(run.model.state_dict(), weights[1], rtol=0, atol=0)


def test_a_resumed_run_remembers_its_best(tmp_path):
    options = {"validate_every": 4, "select": "r"}
    with pytest.raises(Killed):
        train(make(tmp_path, validate=scores([5.0, 1.0]), **options), killed_at=10)
    run = train(make(tmp_path, validate=scores([2.0, 3.0]), **options))
    assert run.best == {"step": 4, "value": 5.0}
    (tmp_path / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match="best.pt: not found, and .*last.pt goes with it"):
        make(tmp_path, **options).resume()


def test_a_snapshot_elsewhere(tmp_path):
    run = train(make(tmp_path / "out", snapshot=tmp_path / "kept" / "snap.pt"))
    assert (tmp_path / "kept" / "snap.pt").is_file() and not (tmp_path / "out" / "last.pt").exists()
    assert make(tmp_path / "other", snapshot=tmp_path / "kept" / "snap.pt").resume() == STEPS
    assert run.resume() == STEPS


# Pruned weights


class Prunable(nn.Module):
    """`spike` is a factor of a loss on the pruned weights of the first layer alone."""

    def __init__(self, spike):
        super().__init__()
        self.up, self.down, self.spike = nn.Linear(4, 8), nn.Linear(8, 1), spike
        self.register_buffer("gone", torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) < 0.6)

    def forward(self, x, step):
        loss = (self.down(self.up(x).relu()).float() - 1).square().mean()
        return {"loss": loss + self.spike * self.up.weight[self.gone].sum()}


HELD = {
    "adamw": lambda model: adamw(model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.98), fused=False),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "muon": lambda model: muon(model, lr=0.1, matrix_lr=0.05, weight_decay=0.1, betas=(0.9, 0.98)),
}


def held(folder, optimizer, precision, spike=1.0, **options):
    torch.manual_seed(0)
    # Fabric takes bf16 on CPUs where fp16 is asked for: give it what it would take on a GPU, loss scale included.
    plugins = [] if precision == "32-true" else [MixedPrecision(precision, "cpu")]
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    model = Prunable(spike)
    raw = HELD[optimizer](model)
    view = view_of(model)
    masks = Masks({"up.weight": ~model.gone, "down.weight": torch.ones(1, 8, dtype=torch.bool)})
    wrapped, wrapped_optimizer = fabric.setup(model, raw)
    options = {"identity": {}, "seed": 3, "log_every": 2, "save_every": 3, "hold": Held(view, raw, masks)} | options
    return Run(fabric, wrapped, wrapped_optimizer, lambda step: 1.0, STEPS, folder, **options)


def zeros(state):
    return bool((state["up.weight"][state["gone"]] == 0).all())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_pruned_weights_stay_zero(tmp_path, optimizer, precision, clip_norm, accumulate, caplog):
    run = held(tmp_path, optimizer, precision, clip_norm=clip_norm, accumulate=accumulate)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    fit(run, split(accumulate), 0)
    after = run.model.state_dict()
    assert zeros(after) and zeros(torch.load(tmp_path / "last.pt", weights_only=True)["model"])
    assert not caplog.records, "no weight had moved before a checkpoint"
    kept = ~after["gone"]
    assert (after["up.weight"] != before["up.weight"])[kept].float().mean() > 0.9


def test_an_optimizer_that_moves_zeros_is_corrected_before_each_checkpoint(tmp_path, caplog):
    """Muon makes every update orthogonal, so that pruned weights move too."""
    run = held(tmp_path, "muon", "32-true", validate=lambda: {"r": 1.0}, select="r", validate_every=4)
    fit(run, batches(0), 0)
    assert "pruned weights had moved from zero" in caplog.text
    for name in ("last.pt", "best.pt"):
        assert zeros(torch.load(tmp_path / name, weights_only=True)["model"])


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_overflow_in_pruned_gradients_does_not_lose_the_step(tmp_path, clip_norm):
    runs = []
    for spike in (0.0, 1e35):  # infinite once it is scaled
        run = held(tmp_path / str(spike), "adamw", "16-mixed", spike=spike, clip_norm=clip_norm)
        fit(run, batches(0), 0)
        runs.append(run)
    scales = [run.fabric.strategy.precision.state_dict()["scale"] for run in runs]
    assert scales[0] == scales[1], "no step more was given up"
    torch.testing.assert_close(runs[0].model.state_dict(), runs[1].model.state_dict(), rtol=0, atol=0)


def test_clipping_does_not_count_pruned_gradients(tmp_path):
    """The kept weights move as if the pruned ones had no gradient, however large that is."""
    small = held(tmp_path / "small", "sgd", "32-true", spike=0.0, clip_norm=0.01)
    large = held(tmp_path / "large", "sgd", "32-true", spike=1e4, clip_norm=0.01)
    for run in (small, large):
        fit(run, batches(0), 0)
    torch.testing.assert_close(small.model.state_dict(), large.model.state_dict(), rtol=1e-5, atol=1e-7)
    same_norms = [[row for row in rows(tmp_path / name) if row[1] == "norm"] for name in ("small", "large")]
    assert same_norms[0] == same_norms[1]


def test_a_checkpoint_with_weights_where_there_should_be_none_is_corrected(tmp_path):
    run = held(tmp_path, "adamw", "32-true")
    fit(run, batches(0), 0)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["model"]["up.weight"] += 1
    torch.save(state, tmp_path / "last.pt")
    run = held(tmp_path, "adamw", "32-true")
    run.resume()
    assert zeros(run.model.state_dict())
