"""ALPS and ADMM as pruners: masks and weights of their reconstructions, with counts that any allocation gives."""

import pytest
import torch
from torch import nn

import pruners
from sparsity.allocation.budget import budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.admm import ADMM
from sparsity.reconstruction.alps import ALPS
from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.equations import relative_error
from sparsity.reconstruction.projection import project
from sparsity.reconstruction.sparsegpt import SparseGPT
from sparsity.run.request import Request
from sparsity.statistics.hessian import gram
from sparsity.statistics.passes import collect
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

pytestmark = pytest.mark.script  # long: left out of make test-fast

SOLVERS = {"alps": ALPS, "admm": ADMM}
SPARSITY = "0.57"


class Net(nn.Module):
    """Two modalities; one layer is wider than a block of 128 columns, and a weight is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 132), nn.Linear(132, 12)
        self.again = nn.Linear(12, 132)
        self.again.weight = self.up.weight

    def forward(self, batch):
        return self.again(self.down(self.up(self.embed(batch).relu()).relu()))


@pytest.fixture
def view():
    model = Net().eval().double()
    group = {"embed": "vision"}
    return PrunableView(model, group_of=lambda name: group.get(name.split(".")[0], "text"), forward=model)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def once(name, view, data, *, pattern=None, target=SPARSITY, **options):
    options = {"calibration_mode": "dense"} | options
    ((_, masks),) = pruners.build(name, **options).prune(view, data, None if pattern else [target], pattern=pattern)
    return masks


def lost(masks):
    return {name: int((~mask).sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("pattern", [None, NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_masks_and_weights_are_those_of_the_reconstruction(view, data, name, pattern):
    masks = once(name, view, data, pattern=pattern)
    sparsity = None if pattern else SPARSITY
    for layer, hessian in collect(view, "hessian", data).items():
        problem = Problem(layer, view.weights[layer].matrix(), {"hessian": hessian}, None, sparsity, "layer", pattern)
        kept, updated = SOLVERS[name]().solve(problem)
        assert torch.equal(masks[layer], kept) and torch.equal(masks.weights[layer], updated)
        assert pattern or int((~kept).sum()) == budget(SPARSITY, kept.numel())
    assert masks.provenance["pruner"] == masks.provenance["reconstruction"] == name


@pytest.mark.parametrize("allocation", ["global", "group", "magnitude", "alpha", "owl"])
@pytest.mark.parametrize("scope", ["layer", "row", "block"])
@pytest.mark.parametrize("name", SOLVERS)
def test_an_allocation_says_how_many_and_the_solver_which(view, data, name, scope, allocation):
    masks = once(name, view, data, allocation=allocation, scope=scope)
    wanda = once("wanda", view, data, allocation=allocation, scope=scope)
    assert lost(masks) == lost(wanda) and len(set(lost(masks).values())) > 1
    assert any(lost(masks)[layer] != budget(SPARSITY, weight.numel) for layer, weight in view.weights.items())
    assert masks.digest() != wanda.digest(), "the mask is the solver's own"
    assert all(not masks.weights[layer][~masks[layer]].any() for layer in masks)


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_a_mask_of_its_own_beats_the_score_that_it_starts_from(view, data, allocation):
    own = once("alps", view, data, allocation=allocation)
    given = once("wanda", view, data, allocation=allocation, scope="layer", reconstruct="alps")
    assert lost(own) == lost(given)
    for layer, hessian in collect(view, "hessian", data).items():
        problem = Problem(layer, view.weights[layer].matrix(), {"hessian": hessian})
        error = {
            kind: relative_error(problem, masks.weights[layer], 0.01) for kind, masks in (("o", own), ("g", given))
        }
        assert error["o"] <= error["g"]


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_nest_and_each_finds_its_mask_within_the_one_before(view, data, name):
    seen = []

    def reading(epoch):
        seen.append({layer: weight.matrix() != 0 for layer, weight in view.weights.items()})
        return CalibrationPass(data)

    engine = pruners.build(name, epochs=3, schedule="linear")
    measured = engine.measure(view, reading(0), Request(["0.6"]))
    ((_, masks),) = engine.masks(view, measured, Request(["0.6"]), reading)
    states = [*seen[-2:], dict(masks)]
    for step, state in enumerate(states, 1):
        assert lost(state) == {n: budget(0.2 * step, weight.numel) for n, weight in view.weights.items()}
    for larger, smaller in zip(states, states[1:], strict=False):
        assert all(not (smaller[layer] & ~larger[layer]).any() for layer in masks), "what was pruned came back"


@pytest.mark.parametrize("scope", ["layer", "row", "block"])
def test_a_projection_has_its_count_and_lies_within_what_is_alive(scope):
    generator = torch.Generator().manual_seed(0)
    scores, alive = torch.rand(6, 260, generator=generator), torch.rand(6, 260, generator=generator) > 0.3
    problem = Problem("layer", scores, {}, scope=scope, count=1001, alive=alive)
    kept = project(problem, scores)
    assert int((~kept).sum()) == 1001 and not (kept & ~alive).any()
    free = project(Problem("layer", scores, {}, scope=scope, count=1001), scores)
    assert int((~free).sum()) == 1001 and (free & ~alive).any()
    none = project(Problem("layer", scores, {}, scope=scope, count=scores.numel()), scores)
    assert not none.any()


@pytest.mark.parametrize("given", [{"count": 5}, {"alive": torch.ones(4, 8, dtype=torch.bool), "sparsity": "0.5"}])
def test_a_sweep_finds_no_mask_of_a_count_or_within_another(given):
    problem = Problem("layer", torch.randn(4, 8), {"hessian": gram(torch.randn(9, 8))}, scope="block", **given)
    with pytest.raises(UserError, match="reconstruction 'sparsegpt' finds no mask of a given count, and none within"):
        SparseGPT().solve(problem)


@pytest.mark.parametrize("name", SOLVERS)
def test_another_reconstruction_is_refused(name):
    with pytest.raises(UserError, match=f"{name} is its own reconstruction: leave --reconstruct lsq out"):
        pruners.build(name, reconstruct="lsq")
    with pytest.raises(UserError, match=f"{name} updates the weights that it keeps: leave --reconstruct none out"):
        pruners.build(name, reconstruct="none")
    with pytest.raises(UserError, match="--enable_update is for sparsegpt"):
        pruners.build(name, enable_update=True)
