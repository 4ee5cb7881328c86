"""Measurements of each layer for allocations, against naive passes; on several ranks, in steps, and after a kill."""

from fractions import Fraction
from threading import Thread

import pytest
import torch

import pruners
from sparsity.allocation.budget import budget
from sparsity.allocation.error import ladder
from sparsity.errors import UserError
from sparsity.replay.replayed import Replayed
from sparsity.run import probing
from sparsity.run.request import Request
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from tests.sparsity.run.test_engine import SPARSITY, KilledError, Net, batches_of, inputs_of, lost, once, same, view_of
from tests.toys import Ranks

pytestmark = pytest.mark.script  # long: left out of make test-fast

WANDA = {"scope": "layer", "allocation": "error:output"}


@pytest.fixture
def view():
    return view_of(Net().eval())


def measured(view, data, sparsities=(SPARSITY,), name="wanda", **options):
    engine = pruners.build(name, **options)
    return engine.measure(view, CalibrationPass(data), Request(sparsities)).sensitivity


def wanda(weight, rows, sparsity):
    """The mask of the lowest |w| ||X_j|| of a layer."""
    scores = (weight.abs() * rows.norm(dim=0)).flatten()
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.argsort()[: budget(sparsity, scores.numel())]] = False
    return kept.view_as(weight)


def relative(weight, pruned, rows, damp=0.01):
    """E(B) / E(0) with H = X'X / n + damping, directly."""
    H = rows.t() @ rows / len(rows)
    H += damp * H.diagonal()[H.diagonal() > 0].mean() * torch.eye(len(H), dtype=H.dtype)
    form = lambda rows: float(((rows @ H) * rows).sum())  # noqa: E731
    return form(weight - pruned) / form(weight)


def optimum(weight, kept, rows, damp=0.01):
    """Least squares on the mask, a row at a time: b_S = H_SS^-1 (W H)_S."""
    H = rows.t() @ rows / len(rows)
    H += damp * H.diagonal()[H.diagonal() > 0].mean() * torch.eye(len(H), dtype=H.dtype)
    result = torch.zeros_like(weight)
    for row, (w, S) in enumerate(zip(weight, kept, strict=True)):
        result[row, S] = torch.linalg.solve(H[S][:, S], (w @ H)[S])
    return result


@pytest.mark.parametrize("reconstruct", ["none", "lsq"])
def test_errors_are_those_of_the_methods_own_masks(view, reconstruct):
    data = batches_of()
    found = measured(view, data, reconstruct=reconstruct, **WANDA).errors
    rows = inputs_of(view, data)
    for name in ("embed.weight", "down.weight"):  # all rows of the third are too many to be solved for
        weight = view.weights[name].matrix().double()
        assert list(found[name]) == ladder(SPARSITY)
        for sparsity, error in found[name].items():
            kept = wanda(weight, rows[name], sparsity)
            pruned = weight * kept if reconstruct == "none" else optimum(weight, kept, rows[name])
            # Conjugate gradients stop at a residual of 1e-4 of the signal: a little above the optimum.
            assert error == pytest.approx(
                relative(weight, pruned, rows[name]), rel=1e-4 if reconstruct == "none" else 0.02
            )


def test_sensitivity_is_what_the_output_moves_by_when_one_layer_is_pruned(view):
    data = batches_of()
    found = measured(view, data, **WANDA).outputs
    rows = inputs_of(view, data)
    with torch.no_grad():
        dense = [view.forward(batch) for batch in data]
        for name, weight in view.weights.items():
            W = weight.matrix().clone()
            kept = wanda(W.double(), rows[name], SPARSITY)
            weight.parameter.copy_(W * kept)
            moved = [view.forward(batch) - out for batch, out in zip(data, dense, strict=True)]
            weight.parameter.copy_(W)
            change = sum(float(m.square().sum() / d.square().sum()) for m, d in zip(moved, dense, strict=True)) / 3
            expected = change / relative(W.double(), W.double() * kept, rows[name])
            assert found[name] == {Fraction(SPARSITY): pytest.approx(expected, rel=1e-3)}


@pytest.mark.parametrize("allocation", ["error", "error:output", "ecoflap"])
def test_masks_do_not_depend_on_what_else_is_asked_for(view, allocation):
    data, options = batches_of(), {"scope": "layer", "allocation": allocation}
    together = pruners.prune(view, "wanda", sparsity=["0.4", SPARSITY], data=data, **options)
    for masks, sparsity in zip(together, ("0.4", SPARSITY), strict=True):
        assert same(masks, pruners.prune(view, "wanda", sparsity=sparsity, data=data, **options))


def test_a_layer_that_does_nothing_to_the_output_loses_most():
    model = Net().eval()
    model.embed.weight.data *= 1e-3  # relative errors do not see it: the output does
    model.embed.bias.data.fill_(1.0)
    view, data = view_of(model), batches_of()
    share = {}
    for allocation in ("error", "error:output"):
        masks = once("wanda", view, data, scope="layer", allocation=allocation)
        share[allocation] = lost(masks, ["embed.weight"]) / 96
    assert share["error:output"] >= 0.86 > share["error"]  # up to the end of its ladder, 0.87


@pytest.mark.parametrize("allocation", ["error:output", "ecoflap"])
def test_two_ranks_decide_as_one(allocation):
    options = {"scope": "layer", "reconstruct": "lsq", "allocation": allocation}
    data, ranks, found = batches_of(4), Ranks(2), {}
    views = [view_of(Net().eval()) for _ in range(2)]  # the seed of their weights is the process'

    def run(rank):
        engine = pruners.build("wanda", **options)
        ((_, found[rank]),) = engine.prune(views[rank], data[rank::2], [SPARSITY], reduce=ranks)

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(found[0], found[1])
    alone = once("wanda", view_of(Net().eval()), data, **options)
    counts = [{name: lost(masks, [name]) for name in masks} for masks in (found[0], alone)]
    if allocation == "error:output":  # ECoFLaP's draws are numbered by rank here
        assert all(abs(counts[0][name] - counts[1][name]) <= 2 for name in counts[0])


def test_a_run_that_was_killed_measures_no_layer_again(view, tmp_path, monkeypatch):
    data, options = batches_of(), {"scope": "layer", "reconstruct": "lsq", "allocation": "error:output"}
    reading = CalibrationPass(data, scratch=Scratch(tmp_path / "wanda", "data"))
    request = Request(["0.4", SPARSITY])

    def run():
        engine = pruners.build("wanda", **options)
        return dict(engine.masks(view, engine.measure(view, reading, request), request, lambda epoch: reading))

    whole = run()
    assert not list(tmp_path.iterdir())
    measure = Replayed.measure

    def killed(self, names, statistics, only=None):
        if only is not None and "down.weight" in names:  # of the reconstruction
            raise KilledError
        return measure(self, names, statistics, only)

    monkeypatch.setattr(Replayed, "measure", killed)
    with pytest.raises(KilledError):
        run()
    monkeypatch.setattr(Replayed, "measure", measure)
    monkeypatch.setattr(probing.Probing, "_measure", lambda *_: pytest.fail("layers are measured again"))
    again = run()
    assert all(same(again[sparsity], masks) for sparsity, masks in whole.items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("allocation", ["error", "ecoflap"])
def test_steps_measure_the_model_as_it_is_and_are_nested(view, allocation):
    data = batches_of()
    masks = once("wanda", view, data, scope="layer", allocation=allocation, epochs=3, schedule="cubic")
    assert lost(masks) == budget(SPARSITY, view.numel)


def test_bounds_hold_and_modalities_keep_their_share(view):
    options = {"scope": "layer", "allocation_within": "group", "min_keep": 0.4, "max_keep": 0.5}
    for allocation in ("error", "global", "magnitude", "owl"):
        masks = once("wanda", view, batches_of(), allocation=allocation, **options)
        for names in view.groups.values():
            assert lost(masks, names) == budget(SPARSITY, sum(view.weights[name].numel for name in names))
        assert all(0.4 <= float(mask.float().mean()) <= 0.5 for mask in masks.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"allocation": "error:input"}, "got 'input'"),
        ({"allocation": "owl:output"}, "owl takes nothing after it"),
        ({"min_keep": 0.6, "max_keep": 0.5}, "--min_keep 0.6 is above --max_keep 0.5"),
        ({"min_keep": 0.5}, "--min_keep 0.5"),
        ({"max_keep": 0.4, "epochs": 2}, "--max_keep: the first of several steps"),
        ({"allocation_within": "tower"}, "allocation_within must be one of model, group"),
        ({"allocation": {"tower": 0.5}}, "'tower' matches no prunable layer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(view, options, told):
    with pytest.raises(UserError) as error:
        once("wanda", view, batches_of(), **options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_outputs_are_needed_only_where_they_are_compared(view):
    forward = view._forward
    view._forward = lambda batch: (forward(batch), None)[1]
    assert once("wanda", view, batches_of(), scope="layer", allocation="error")
    with pytest.raises(UserError, match="returns no tensor: take --allocation error"):
        once("wanda", view, batches_of(), **WANDA)
