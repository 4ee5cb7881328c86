"""The engine that runs plans: masks and weights on every axis, steps, groups, kills, and one call."""

import copy
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import pruners
from sparsity.allocation.budget import SCHEDULES, budget, step_sparsity
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.run.generic import generic_view
from sparsity.run.request import Request
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

pytestmark = pytest.mark.script  # long: left out of make test-fast

SPARSITY = "0.57"


class KilledError(Exception):
    pass


class Net(nn.Module):
    """Three layers, in two modalities and two blocks; one is wider than a block of 128 columns."""

    def __init__(self, width=132):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Linear(8, 12), nn.Linear(12, width), nn.Linear(width, 4)

    def forward(self, batch):
        return self.down(self.up(self.embed(batch).relu()).relu())


def view_of(model):
    return PrunableView(
        model,
        group_of=lambda name: "vision" if name.startswith("embed") else "text",
        forward=model,
        loss=lambda batch, generator: model(batch).square().mean(),
        blocks=[model.up, model.down],
    )


@pytest.fixture
def view():
    return view_of(Net().eval())


def batches_of(count=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 8, generator=generator, dtype=dtype) for _ in range(count)]


def once(name, view, data=None, target=SPARSITY, *, pattern=None, groups=None, **options):
    targets = None if pattern else [target]
    ((_, masks),) = pruners.build(name, **options).prune(view, data, targets, pattern=pattern, groups=groups)
    return masks


def same(a, b):
    return a.digest() == b.digest() and all(torch.equal(a.weights[name], b.weights[name]) for name in b.weights)


def lost(masks, names=None):
    return sum(int((~masks[name]).sum()) for name in names or masks)


def inputs_of(view, data):
    """Name -> the inputs of that layer in the dense model, (tokens, in), by hooks of our own."""
    seen = {name: [] for name in view.weights}
    hooks = [
        weight.modules[0].register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, weight in view.weights.items()
    ]
    with torch.no_grad():
        for batch in data:
            view.forward(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


# A mask of one method, weights of another


def naive_obs(weight, rows, kept, damp=0.01):
    """SparseGPT, arXiv 2301.00774, algorithm 1 with the mask given: column by column, in float64."""
    H = 2 / len(rows) * rows.t() @ rows
    live = H.diagonal() > 0
    H += damp * H.diagonal()[live].mean() * torch.eye(len(H), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    result = weight.double() * live
    for j in range(result.shape[1]):
        error = result[:, j] * ~kept[:, j] / upper[j, j]
        result[:, j:] -= error[:, None] * upper[j, j:]
        result[:, j] *= kept[:, j]
    return result


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_wandas_mask_with_sparsegpts_weights(view, pattern):
    view.model.double()
    data = batches_of(dtype=torch.float64)
    alone = once("wanda", view, data, pattern=pattern)
    masks = once("wanda", view, data, pattern=pattern, reconstruct="sparsegpt", calibration_mode="dense")
    assert masks.digest() == alone.digest() and not alone.weights and set(masks.weights) == set(view.weights)
    assert masks.provenance["reconstruction"] == "sparsegpt" and alone.provenance["reconstruction"] == "none"
    rows = inputs_of(view, data)
    for name, weight in view.weights.items():
        expected = naive_obs(weight.matrix(), rows[name], masks[name])
        torch.testing.assert_close(masks.weights[name], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pool", ["global", "group", "magnitude", "layer", "row"])
def test_sparsegpt_in_a_pool_that_it_does_not_solve_is_its_saliency_and_then_its_sweep(view, pool):
    view.model.double()
    data = batches_of(dtype=torch.float64)
    saliency = once("sparsegpt", view, data, pool=pool, calibration_mode="dense")
    updated = once("sparsegpt", view, data, pool=pool, calibration_mode="dense", enable_update=True)
    assert updated.digest() == saliency.digest()
    rows = inputs_of(view, data)
    for name, weight in view.weights.items():
        expected = naive_obs(weight.matrix(), rows[name], updated[name])
        torch.testing.assert_close(updated.weights[name], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("allocation", ["alpha", "owl"])
@pytest.mark.parametrize("calibration", ["dense", "sequential"])
@pytest.mark.parametrize("reconstruct", ["none", "sparsegpt"])
def test_an_allocation_holds_in_every_order_of_calibration(view, allocation, calibration, reconstruct):
    """Counts of layers do not depend on how their scores are measured; and it is no even share."""
    options = {"allocation": allocation, "calibration_mode": calibration, "reconstruct": reconstruct}
    for name, scope in (("wanda", "row"), ("sparsegpt", "block")):
        masks = once(name, view, batches_of(), scope=scope, **options)
        alone = once("magnitude", view, batches_of(), allocation=allocation)
        assert lost(masks) == budget(SPARSITY, view.numel)
        assert [lost(masks, [layer]) for layer in masks] == [lost(alone, [layer]) for layer in masks]
    if allocation == "alpha":
        assert any(lost(alone, [n]) != budget(SPARSITY, w.numel) for n, w in view.weights.items())


# Steps


def in_steps(name, view, schedule, steps=3, scratch=None, killed=None, **options):
    """The masks of each step, the last as the engine gives them, for two sparsities."""
    engine = pruners.build(name, epochs=steps, schedule=schedule, **options)
    seen, asked = [], []

    def reading(epoch):
        if len(asked) == killed:
            raise KilledError
        asked.append(epoch)
        seen.append((epoch, {n: weight.matrix() != 0 for n, weight in view.weights.items()}))
        return CalibrationPass(
            batches_of(seed=epoch + 1), scratch=scratch and Scratch(scratch / f"epoch{epoch}", f"data {epoch}")
        )

    measured = engine.measure(view, reading(0))
    seen.clear()
    return dict(engine.masks(view, measured, Request(["0.4", SPARSITY]), reading)), seen, asked


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", pruners.available())
def test_steps_are_exact_and_nest(view, name, schedule):
    options = {} if name == "chita" else {"allocation": "global", "scope": "layer"}
    options |= {"calibration_mode": "dense"} if pruners.build(name).plan.sequential else {}
    before = copy.deepcopy(view.model.state_dict())
    if name == "tamt" and schedule == "const":  # after the first step, there is nothing left to learn scores for
        with pytest.raises(UserError, match="weights are 0 already"):
            in_steps(name, view, schedule, **options)
        assert all(torch.equal(tensor, before[key]) for key, tensor in view.model.state_dict().items())
        return
    found, seen, _ = in_steps(name, view, schedule, **options)
    for first, (target, masks) in zip((0, 3), found.items(), strict=True):
        states = [state for _, state in seen[first : first + 3]] + [dict(masks)]
        counts = [sum(int((~mask).sum()) for mask in state.values()) for state in states]
        assert counts == [0] + [budget(step_sparsity(target, t, 3, schedule), view.numel) for t in (1, 2, 3)]
        for larger, smaller in pairwise(states):
            assert all(not (smaller[n] & ~larger[n]).any() for n in masks), "what was pruned came back"
        assert masks.provenance["epochs"] == 3 and masks.provenance["schedule"] == schedule
        assert "step" not in masks.provenance
    assert all(torch.equal(tensor, before[key]) for key, tensor in view.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wanda", {}),
        ("wanda", {"reconstruct": "lsq"}),
        ("wanda", {"allocation": "owl", "calibration_mode": "sequential"}),
        ("sparsegpt", {"reconstruct": "sparsegpt"}),
        ("omp", {"allocation": "alpha", "reconstruct": "sparsegpt"}),
        ("snip", {"allocation": "magnitude", "scope": "row"}),
        ("rand", {"pool": "group"}),
        ("chita", {}),
    ],
)
def test_killed_steps_go_on_with_the_same_bits(view, tmp_path, name, options):
    whole, seen, asked = in_steps(name, view, "cubic", **options)
    assert asked == [0, *[0, 1, 2] * 2]
    with pytest.raises(KilledError):
        in_steps(name, view, "cubic", scratch=tmp_path, killed=6, **options)  # before the last step of the second
    resumed, _, asked = in_steps(name, view, "cubic", scratch=tmp_path, **options)
    assert asked == [0, 2], "one sparsity was done, and two steps of the other"
    assert all(same(resumed[target], masks) for target, masks in whole.items())
    assert not list(tmp_path.iterdir()), "what was kept is removed in the end"
    for first in (0, 3):
        (_, dense), *later = seen[first : first + 3]
        assert all(mask.all() for mask in dense.values()), "each sparsity starts from the dense model"
        assert all(not mask.all() for _, state in later for mask in state.values())


# Groups


@pytest.mark.parametrize("allocation", ["global", "group", "layer", "magnitude", "alpha", "owl"])
@pytest.mark.parametrize("name", ["omp", "wanda"])
def test_groups_lose_their_own_and_the_rest_is_filled_to_the_budget(view, allocation, name):
    numel = {group: sum(view.weights[n].numel for n in names) for group, names in view.groups.items()}
    masks = once(name, view, batches_of(), allocation=allocation, scope="layer", groups={"vision": "0.31"})
    assert lost(masks, view.groups["vision"]) == budget("0.31", numel["vision"])
    rest = budget(SPARSITY, view.numel) - budget("0.31", numel["vision"])
    if allocation == "layer":  # each of its layers rounds down
        assert rest - len(view.groups["text"]) < lost(masks, view.groups["text"]) <= rest
    else:
        assert lost(masks) == budget(SPARSITY, view.numel)
    assert masks.provenance["group_sparsity"] == {"vision": "0.31"}


def test_groups_that_cannot_make_the_sparsity_are_refused(view, caplog):
    both = {"vision": "0.31", "text": "0.31"}
    masks = once("omp", view, groups=both)  # every group is named: they decide, and it is said
    assert lost(masks) == lost(once("omp", view, target="0.31", groups=both))
    assert re.search(r"names every group, and they come to 3[01][.0-9]* % of all weights, not to 57 %", caplog.text)
    assert lost(once("omp", view, target="0.31", groups=both)) <= budget("0.31", view.numel)
    with pytest.raises(UserError, match="--group_sparsity audio: the model has the groups vision, text"):
        once("omp", view, groups={"audio": "0.5"})
    with pytest.raises(UserError, match="which leaves -[0-9]+ for the other"):
        once("omp", view, target="0.1", groups={"text": "0.9"})
    with pytest.raises(UserError, match="chita decides by itself"):
        once("chita", view, batches_of(), groups={"vision": "0.5"})


def test_groups_with_reconstruction_and_steps(view):
    groups, vision = {"vision": "0.31"}, view.groups["vision"]
    for options in ({"reconstruct": "lsq"}, {"epochs": 3, "schedule": "linear"}):
        masks = once("wanda", view, batches_of(), allocation="global", groups=groups, **options)
        assert lost(masks) == budget(SPARSITY, view.numel)
        assert lost(masks, vision) == budget("0.31", view.weights[vision[0]].numel)


# What is left behind


PLANS = [
    ("wanda", {}),
    ("wanda", {"calibration_mode": "sequential"}),
    ("wanda", {"reconstruct": "lsq"}),
    ("sparsegpt", {"reconstruct": "sparsegpt"}),
    ("omp", {"reconstruct": "lsq", "epochs": 2}),
    ("snip", {"epochs": 3, "schedule": "linear"}),
    ("tamt", {}),
    ("chita", {"epochs": 2}),
]


@pytest.mark.parametrize(("name", "options"), PLANS, ids=str)
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_what_it_was(view, name, options, failing):
    """To the bit and to the storage, also where the data ends in an exception, wherever that comes."""
    state = copy.deepcopy(view.model.state_dict())
    storage = {key: parameter.data_ptr() for key, parameter in view.model.named_parameters()}
    reads = []

    class Failing(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                reads.append(1)
                if len(reads) == limit:
                    raise KilledError
                yield batch

    limit = None
    once(name, view, Failing(batches_of()), **options)
    number = len(reads)
    for nth in (2, number // 2, number) if failing else ():
        limit = nth
        reads.clear()
        with pytest.raises(KilledError):
            once(name, view, Failing(batches_of()), **options)
        assert all(torch.equal(tensor, state[key]) for key, tensor in view.model.state_dict().items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in view.model.state_dict().items())
    assert storage == {key: parameter.data_ptr() for key, parameter in view.model.named_parameters()}
    assert all(p.grad is None and p.requires_grad for p in view.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in view.model.modules())


# One call


def test_a_module_is_pruned_in_one_call(tmp_path):
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    masks = pruners.prune(model, "wanda", pattern="2:4", reconstruct="sparsegpt", data=batches_of())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in masks.values())
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert again.digest() == masks.digest() and again.provenance["pattern"] == "2:4"
    view = generic_view(model)
    assert masks.report(view)
    masks.apply(view)
    for name, weight in view.weights.items():
        assert torch.equal(weight.matrix(), masks.weights[name]) and not weight.matrix()[~masks[name]].any()


@pytest.mark.parametrize("sparsity", ["0.5", 0.5])
def test_sparsities_of_one_call(sparsity):
    model, view = Net(), generic_view(Net())
    assert lost(pruners.prune(model, "omp", sparsity=sparsity)) == view.numel // 2
    one, two = pruners.prune(model, "omp", sparsity=[sparsity, 0.9], allocation="layer", scope="row")
    assert lost(one) < lost(two) and one.provenance["scope"] == "row"
    again = pruners.prune(view_of(model), "omp", sparsity=sparsity, group_sparsity={"vision": 0.25})
    assert lost(again, ["embed.weight"]) == 24
    pairs = [{"batch": batch} for batch in batches_of()], [(batch,) for batch in batches_of()]
    expected = pruners.prune(model, "wanda", sparsity=sparsity, data=batches_of())
    assert all(same(pruners.prune(model, "wanda", sparsity=sparsity, data=data), expected) for data in pairs)


def test_what_one_call_refuses():
    with pytest.raises(UserError, match="give at least one sparsity, or a pattern"):
        pruners.prune(Net(), "omp")
    with pytest.raises(UserError, match="there is no pruner 'wander', did you mean 'wanda'"):
        pruners.prune(Net(), "wander", sparsity=0.5)
    with pytest.raises(UserError, match="'wanda' needs calibration data"):
        pruners.prune(Net(), "wanda", sparsity=0.5)
    with pytest.raises(UserError, match="the model returns no loss for a batch"):
        pruners.prune(Net(), "snip", sparsity=0.5, data=batches_of())


@pytest.mark.parametrize("allocation", ["magnitude", "owl", "alpha"])
def test_allocations_of_learned_masks_read_the_dense_weights(view, allocation, monkeypatch):
    """While scores are learned, the model's weights are masked ones, and nothing at all before the first mask."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **_: torch.full_like(like, float("nan")))
    learned = once("tamt", view, batches_of(), allocation=allocation)
    monkeypatch.undo()
    expected = once("omp", view, batches_of(), allocation=allocation)
    assert [lost(learned, [name]) for name in view.weights] == [lost(expected, [name]) for name in view.weights]
