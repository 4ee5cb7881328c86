"""Every combination of the axes is a plan or one line; of those that are, a set that covers all pairs is run."""

import copy
import random
from functools import cache
from itertools import combinations, product

import pytest
import torch
from torch import nn

import pruners
from sparsity.allocation.budget import budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.run.axes import ALLOCATIONS, CALIBRATIONS, RECONSTRUCTIONS, SCOPES
from sparsity.run.plan import NONE
from sparsity.run.registry import Registry
from sparsity.run.request import Request
from sparsity.view import PrunableView

pytestmark = pytest.mark.script  # long: left out of make test-fast

SPARSITY, PATTERN = "0.57", NM(2, 4)
# Of allocations: within each modality, and with bounds on what a layer keeps.
GROUPS, BOUNDS = {"allocation_within": "group"}, {"min_keep": 0.1, "max_keep": 0.9}
ALLOCATED = {name: {"allocation": name} for name in (*ALLOCATIONS.names(), "error:output")} | {
    "rules": {"allocation": {"vision": "0.4"}},
    "bounded global": {"allocation": "global", **BOUNDS},
    "bounded owl in groups": {"allocation": "owl", **BOUNDS, **GROUPS},
    "error in groups": {"allocation": "error", **GROUPS},
}
AXES = {
    "score": pruners.available(),
    "allocation": list(ALLOCATED),
    "scope": SCOPES,
    "pattern": [None, PATTERN],
    "reconstruct": [NONE, *RECONSTRUCTIONS.names()],
    "calibration_mode": CALIBRATIONS,
    "epochs": [1, 2],
}
REFINED = {
    "plain": {},
    "target": {"target": "dense:0.5"},
    "biases": {"correct_bias": True},
    "damping": {"damp": "auto"},
    "exchanges": {"swaps": 2},
    "all": {"target": "dense", "correct_bias": True, "damp": "auto", "swaps": 2, "layer_errors": True},
}
AXES["refined"] = [*REFINED]
MOST = 350  # plans that are run
TRIED = 0.1  # of the combinations with a refinement, a share that has all pairs


class Net(nn.Module):
    """Two layers of different size, each a block and a modality of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, batch):
        return self.second(self.first(batch).relu())


def made():
    model = Net().eval()
    return PrunableView(
        model,
        group_of=lambda name: "vision" if name.startswith("first") else "text",
        forward=model,
        loss=lambda batch, generator: model(batch).square().mean(),
        blocks=[model.first, model.second],
    )


def batches_of(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 8, generator=generator) for _ in range(count)]


def options_of(chosen):
    """Options of `build`. Calibration that a plan does not read is refused, "dense" is what it is by itself."""
    given = {axis: value for axis, value in chosen.items() if axis not in ("score", "pattern", "refined")}
    given |= ALLOCATED[chosen["allocation"]] | REFINED[chosen["refined"]]
    return given if given["epochs"] == 1 else given | {"schedule": "linear"}


def plan_of(chosen):
    """The engine of a combination, or the error that refuses it."""
    request = Request(() if chosen["pattern"] else [SPARSITY], chosen["pattern"])
    try:
        engine = pruners.build(chosen["score"], **options_of(chosen))
        engine.plan.check(request)
    except UserError as error:
        return error
    return engine


def every():
    chance = random.Random(0)
    for values in product(*AXES.values()):
        chosen = dict(zip(AXES, values, strict=True))
        if chosen["refined"] == "plain" or chance.random() < TRIED:
            yield chosen


@pytest.fixture(scope="module")
def plans():
    """Combination -> its engine or error. The folders of choices are listed once, not for each of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "names", cache(Registry.names))
        return {tuple(chosen.values()): plan_of(chosen) for chosen in every()}


def test_every_combination_is_a_plan_or_one_line(plans):
    errors = [str(found) for found in plans.values() if isinstance(found, UserError)]
    assert len(plans) > 5_000 and 0 < len(errors) < len(plans)
    for error in set(errors):
        assert error and "\n" not in error and len(error) < 300, error


def test_what_is_refused_is_refused_for_a_reason_of_its_axes(plans):
    """No score that reads inputs is refused a plan in dense calibration and one step, but for solvers of all layers and
    for a reconstruction other than the pruner's own; refinements have tests of their own.
    """
    readers = {score for score in AXES["score"] if pruners.build(score).plan.of_inputs}
    for values, found in plans.items():
        chosen = dict(zip(AXES, values, strict=True))
        whole = "chita" in (chosen["score"], chosen["reconstruct"])
        other = chosen["score"] in ("admm", "alps") and chosen["reconstruct"] != chosen["score"]
        other = other or chosen["refined"] != "plain"
        reads = chosen["score"] in readers or chosen["reconstruct"] in ("lsq", "sparsegpt")
        if chosen["calibration_mode"] == "dense" and chosen["epochs"] == 1 and reads and not (whole or other):
            learned = chosen["score"] == "tamt" and chosen["allocation"].startswith(("error", "bounded global"))
            patterned = chosen["pattern"] and {*BOUNDS, *GROUPS} & set(ALLOCATED[chosen["allocation"]])
            assert isinstance(found, UserError) == bool(learned or patterned), (chosen, found)


def covering(combos, seed=0, tries=60):
    """Combinations that together have every pair of values that any of them has: greedy, the best of a few."""
    chance = random.Random(seed)
    pairs = {combo: set(combinations(enumerate(combo), 2)) for combo in combos}
    left, chosen = set().union(*pairs.values()), []
    while left:
        wanted = min(left, key=repr)  # one that is sure to go, so that this ends
        able = [combo for combo in combos if wanted in pairs[combo]]
        best = max(chance.sample(able, min(tries, len(able))), key=lambda combo: len(pairs[combo] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def check_exact(view, masks, chosen):
    """Exactly as many as asked for: in each group of M, in each layer, row or block, in each modality, or in all."""
    lost = {name: int((~mask).sum()) for name, mask in masks.items()}
    sizes = {name: weight.numel for name, weight in view.weights.items()}
    if chosen["pattern"]:
        assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in masks.values())
    elif chosen["allocation"] == "layer" and chosen["score"] != "chita":
        for mask in masks.values():
            units = {"row": mask.unbind(), "block": mask.split(128, dim=1)}.get(chosen["scope"], [mask])
            assert all(int((~unit).sum()) == budget(SPARSITY, unit.numel()) for unit in units)
    elif chosen["allocation"] in ("group", "magnitude") or chosen["allocation"].endswith("in groups"):
        for names in view.groups.values():
            assert sum(lost[name] for name in names) == budget(SPARSITY, sum(sizes[name] for name in names))
    else:
        assert sum(lost.values()) == budget(SPARSITY, view.numel)
    if chosen["allocation"].startswith("bounded"):
        assert all(0.1 <= 1 - lost[name] / sizes[name] <= 0.9 for name in lost)
    for name, weight in masks.weights.items():
        assert not weight[~masks[name]].any() and weight.isfinite().all()
    assert bool(masks.weights) == (chosen["reconstruct"] != NONE)


def test_plans_that_cover_all_pairs_are_exact(plans):
    legal = [values for values, found in plans.items() if not isinstance(found, UserError)]
    chosen = covering(legal)
    assert len(chosen) <= MOST
    view, batches = made(), batches_of()
    before, failed = copy.deepcopy(view.model.state_dict()), []
    for values in chosen:
        combination = dict(zip(AXES, values, strict=True))
        pattern = combination["pattern"]
        try:
            ((_, masks),) = plans[values].prune(view, batches, None if pattern else [SPARSITY], pattern=pattern)
            check_exact(view, masks, combination)
        except (UserError, AssertionError) as error:
            failed.append((combination, error))
        assert all(torch.equal(tensor, before[key]) for key, tensor in view.model.state_dict().items()), combination
    assert not failed, f"{len(failed)} of {len(chosen)}, such as {failed[0]}"
