"""Every pruner against its formula in float64, and what all pruners have in common."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

import pruners
from pruners.base import Pruner
from sparsity.allocation.budget import budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.run.axes import POOLS
from sparsity.run.engine import Measured
from sparsity.run.registry import Registry
from sparsity.run.request import Request
from sparsity.statistics.reading import CalibrationPass
from tests.toys import Attention, Conv1D, layers, view_of

SPARSITIES = ["0.3", "0.57", "0.9"]
NESTING = ["rand", "omp", "localmp", "l2", "lamp"]


@pytest.fixture
def view():
    groups = {"a": "vision", "b": "text", "c": "vision", "d": "text"}
    model = layers((8, 12), (6, 8), (5, 6), (7, 4))

    def forward(batch):
        for letter, x in zip(groups, batch, strict=True):
            model[letter](x)

    def loss(batch, generator):
        return sum(model[letter](x).square().sum() for letter, x in zip(groups, batch, strict=True))

    return view_of(model, group_of=lambda name: groups[name[0]], forward=forward, loss=loss)


@pytest.fixture
def batches(view):
    generator = torch.Generator().manual_seed(1)
    widths = [weight.shape[1] for weight in view.weights.values()]
    return [[torch.randn(2, 3, width, generator=generator) for width in widths] for _ in range(2)]


def pruned(masks):
    return {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}


def lowest(scores, count):
    """Kept, by a stable sort of everything."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:count]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}


def same(masks, expected):
    return all(torch.equal(masks[name], expected[name]) for name in expected) and list(masks) == list(expected)


# What each computes: the formulas of the papers, spelt out in float64.


def naive_magnitude(w, statistic):
    return w.abs().double()


def naive_l2(w, statistic):
    return w.double().abs() / w.double().square().sum().sqrt()


def naive_lamp(w, statistic):
    flat = w.double().square().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    scores = [0.0] * len(flat)
    for position, i in enumerate(order):
        total = sum(flat[j] for j in reversed(order[position:]))
        scores[i] = flat[i] / total if flat[i] else 0.0
    return torch.tensor(scores, dtype=torch.float64).view_as(w)


def naive_multiflow(w, squares):
    a = w.double().abs() * squares.sqrt()
    return a.mean(dim=1, keepdim=True) * w.double().abs() * a.mean(dim=0, keepdim=True)


def naive_ria(w, squares):
    """Weight by weight; a row or column of zeros has no relative importance."""
    rows, scores = w.double().abs().tolist(), torch.zeros(w.shape, dtype=torch.float64)
    columns = list(zip(*rows, strict=True))
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value:
                norm = float(squares[j]) ** 0.5
                scores[i, j] = (value / sum(columns[j]) + value / sum(row)) * norm**0.5
    return scores


NAIVE = {
    "omp": naive_magnitude,
    "localmp": naive_magnitude,
    "l2": naive_l2,
    "lamp": naive_lamp,
    "multiflow": naive_multiflow,
    "ria": naive_ria,
}


@pytest.mark.parametrize("name", NAIVE)
def test_scores_are_the_formula(view, batches, name):
    pruner = pruners.build(name)
    measured = pruner.measure(view, CalibrationPass(batches))
    statistics = measured.statistics.get("input_norms", {})
    scores = dict(pruner.scores(view, measured))
    assert list(scores) == list(view.weights)
    for layer, score in scores.items():
        expected = NAIVE[name](view.weights[layer].matrix(), statistics.get(layer))
        torch.testing.assert_close(score.double(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["omp", "l2", "lamp"])
def test_global_masks_are_the_lowest_scores_of_all(view, name):
    scores = {layer: NAIVE[name](weight.matrix(), None) for layer, weight in view.weights.items()}
    for sparsity, masks in pruners.build(name).prune(view, None, SPARSITIES):
        assert same(masks, lowest(scores, budget(sparsity, view.numel)))


def test_localmp_prunes_each_layer_alone(view):
    for sparsity, masks in pruners.build("localmp").prune(view, None, SPARSITIES):
        for layer, weight in view.weights.items():
            assert same({layer: masks[layer]}, lowest({layer: weight.matrix().abs()}, budget(sparsity, weight.numel)))


def test_ria_by_hand():
    """Rows of sums 4, 2 and 0, columns of sums 1, 5 and 0, inputs of squared norms 1, 16 and 81."""
    weight = torch.tensor([[1.0, -3.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    score = pruners.build("ria").plan.score.score(weight, torch.tensor([1.0, 16.0, 81.0]).double(), None)
    expected = [[1 / 1 + 1 / 4, 2 * (3 / 5 + 3 / 4), 0], [0, 2 * (2 / 5 + 2 / 2), 0], [0, 0, 0]]
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ria_prunes_the_lowest_of_each_row(view, batches):
    pruner = pruners.build("ria")
    statistics = pruner.measure(view, CalibrationPass(batches)).statistics["input_norms"]
    for sparsity, masks in pruner.prune(view, batches, SPARSITIES):
        for layer, weight in view.weights.items():
            scores = naive_ria(weight.matrix(), statistics[layer])
            for mask, row in zip(masks[layer], scores, strict=True):
                assert same({"row": mask}, lowest({"row": row}, budget(sparsity, len(row))))


def test_multiflow_prunes_what_magnitude_takes_from_each_layer(view, batches):
    pruner = pruners.build("multiflow")
    statistics = pruner.measure(view, CalibrationPass(batches)).statistics["input_norms"]
    for sparsity, masks in pruner.prune(view, batches, SPARSITIES):
        count = {}
        for names in view.groups.values():
            magnitudes = {layer: view.weights[layer].matrix().abs() for layer in names}
            numel = sum(view.weights[layer].numel for layer in names)
            count |= pruned(lowest(magnitudes, budget(sparsity, numel)))
        assert pruned(masks) == count
        for layer, weight in view.weights.items():
            score = naive_multiflow(weight.matrix(), statistics[layer])
            assert same({layer: masks[layer]}, lowest({layer: score}, count[layer]))
        for names in view.groups.values():
            total = sum(view.weights[layer].numel for layer in names)
            assert sum(count[layer] for layer in names) == budget(sparsity, total)


def test_a_constant_factor_per_layer_changes_nothing_for_multiflow(view, batches):
    pruner = pruners.build("multiflow")
    measured = pruner.measure(view, CalibrationPass(batches))
    norms = measured.statistics["input_norms"]
    scaled = {name: value * 4.0 ** (i + 1) for i, (name, value) in enumerate(norms.items())}
    ((_, one),) = pruner.masks(view, measured, Request(["0.63"]))
    ((_, other),) = pruner.masks(view, Measured({"input_norms": scaled}), Request(["0.63"]))
    assert same(one, other)


def test_the_last_lamp_score_is_exactly_one_and_zeros_score_zero():
    model = layers((30, 40), (4, 4), (3, 5))
    model["b"].weight.data.zero_()
    model["c"].weight.data[1] = 0
    scores = dict(pruners.build("lamp").scores(view_of(model), Measured()))
    assert scores["a.weight"].max() == 1.0 and scores["c.weight"].max() == 1.0
    assert scores["a.weight"].flatten()[model["a"].weight.abs().argmax()] == 1.0
    assert torch.equal(scores["b.weight"], torch.zeros(4, 4, dtype=torch.float64))
    assert torch.equal(scores["c.weight"][1], torch.zeros(5, dtype=torch.float64))


def test_lamp_breaks_ties_by_index():
    model = layers((1, 4))
    model["a"].weight.data[:] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    (score,) = dict(pruners.build("lamp").scores(view_of(model), Measured())).values()
    torch.testing.assert_close(score, torch.tensor([[1 / 4, 1 / 3, 1 / 2, 1.0]], dtype=torch.float64))


OWN_POOL = {"chita"}  # its solver says how many weights each block keeps
BETWEEN = {"global", "group", "magnitude"}  # layers compete, which no order of blocks allows


@pytest.mark.parametrize("name", sorted(OWN_POOL))
def test_a_pool_that_is_not_the_pruners_own_is_refused(name):
    with pytest.raises(ValueError, match="leave pool 'layer' out"):
        pruners.build(name, pool="layer")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.script] * (name in ("alps", "admm"))) for name in pruners.available()],
)
def test_totals_are_exact(view, batches, name):
    for pool in ("global", None) if name in OWN_POOL else (*POOLS, None):
        plan = pruners.build(name).plan
        dense = {"calibration_mode": "dense"} if plan.sequential and pool in BETWEEN else {}
        if dense and plan.reconstruction is None:
            with pytest.raises(UserError, match="take allocation layer, or calibration_mode dense"):
                next(pruners.build(name, pool=pool).prune(view, batches, SPARSITIES))
        for sparsity, masks in pruners.build(name, pool=pool, **dense).prune(view, batches, SPARSITIES):
            count, lost = sum(pruned(masks).values()), pruned(masks)
            if pool == "global":
                assert count == budget(sparsity, view.numel)
            if pool == "layer":
                assert lost == {n: budget(sparsity, w.numel) for n, w in view.weights.items()}
            if pool == "row":
                assert lost == {n: w.shape[0] * budget(sparsity, w.shape[1]) for n, w in view.weights.items()}
            if pool == "block":  # narrower than 128 columns: one block is the layer
                assert lost == {n: budget(sparsity, w.numel) for n, w in view.weights.items()}
            if pool in ("group", "magnitude"):
                for names in view.groups.values():
                    numel = sum(view.weights[n].numel for n in names)
                    assert sum(lost[n] for n in names) == budget(sparsity, numel)
            assert masks.total == view.numel and masks.total - masks.kept == count


@pytest.mark.parametrize("name", NESTING)
def test_masks_of_growing_sparsity_nest(view, name):
    results = [masks for _, masks in pruners.build(name).prune(view, None, SPARSITIES)]
    for smaller, larger in zip(results, results[1:], strict=False):
        assert all((larger[layer] <= smaller[layer]).all() for layer in view.weights)


@pytest.mark.parametrize("name", pruners.available())
def test_two_runs_are_identical_and_the_model_is_untouched(view, batches, name, tmp_path):
    before = copy.deepcopy(view.model.state_dict())
    for run in "12":
        for sparsity, masks in pruners.build(name).prune(view, batches, SPARSITIES, seed=7):
            masks.save(tmp_path / run / f"{sparsity}.safetensors")
    assert all(torch.equal(before[key], value) for key, value in view.model.state_dict().items())
    for sparsity in SPARSITIES:
        one, two = (tmp_path / run / f"{sparsity}.safetensors" for run in "12")
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", pruners.available())
def test_the_order_of_sparsities_changes_nothing(view, batches, name):
    forwards = dict(pruners.build(name).prune(view, batches, SPARSITIES))
    for sparsity, masks in pruners.build(name).prune(view, batches, SPARSITIES[::-1]):
        assert same(masks, forwards[sparsity])


@pytest.mark.parametrize("name", pruners.available())
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8)])
def test_any_pruner_takes_any_pattern(view, batches, name, pattern):
    ((sparsity, masks),) = pruners.build(name).prune(view, batches, None, pattern=pattern)
    assert sparsity == pattern.sparsity
    dense = [layer for layer, weight in view.weights.items() if weight.shape[1] % pattern.m]
    assert masks.provenance["dense_layers"] == dense != []
    for layer, mask in masks.items():
        if layer in dense:
            assert mask.all()
        else:
            assert set(mask.unflatten(1, (-1, pattern.m)).sum(dim=-1).flatten().tolist()) == {pattern.n}


def test_random_masks_depend_on_the_seed_and_the_name_only(view):
    ((_, one),) = pruners.build("rand").prune(view, None, ["0.5"], seed=1)
    ((_, two),) = pruners.build("rand").prune(view, None, ["0.5"], seed=2)
    assert not same(one, two)
    scores = dict(pruners.build("rand").scores(view, Measured(), seed=1))
    ((name, alone),) = pruners.build("rand").scores(view, Measured(), seed=1, names=["c.weight"])
    assert torch.equal(scores[name], alone)
    assert 0.4 < torch.cat([score.flatten() for score in scores.values()]).mean() < 0.6


def test_provenance_is_recorded(view):
    ((_, masks),) = pruners.build("omp", pool="group").prune(view, None, ["0.63"], seed=3)
    recorded = masks.provenance
    assert (recorded["pruner"], recorded["pool"], recorded["sparsity"], recorded["seed"]) == ("omp", "group", "0.63", 3)
    assert (recorded["allocation"], recorded["scope"], recorded["reconstruction"]) == ("group", "layer", "none")
    assert (recorded["epochs"], recorded["schedule"]) == (1, "exp")
    ((_, masks),) = pruners.build("omp", allocation="group", scope="row").prune(view, None, ["0.63"])
    assert "pool" not in masks.provenance and masks.provenance["scope"] == "row"
    assert len(recorded["model"]) == 64 and recorded["versions"]["torch"] == torch.__version__


def test_tied_weights_are_one_layer(view):
    view = view_of(Attention(), keep_dense=["head"])
    ((_, masks),) = pruners.build("omp").prune(view, None, ["0.5"])
    assert masks.total == view.numel and "again.weight" not in masks
    assert masks.aliases["up.weight"] == ("up.weight", "again.weight")


def test_conv1d_is_pruned_like_its_transpose():
    model = nn.ModuleDict({"a": Conv1D(6, 8)})
    plain = nn.ModuleDict({"a": nn.Linear(8, 6)})
    plain["a"].weight.data = model["a"].weight.data.t().clone()
    for options in ({"sparsities": ["0.57"]}, {"sparsities": None, "pattern": NM(2, 4)}):
        ((_, masks),) = pruners.build("omp").prune(view_of(model), None, **options)
        ((_, expected),) = pruners.build("omp").prune(view_of(plain), None, **options)
        assert torch.equal(masks["a.weight"], expected["a.weight"].t())
        masks.check(view_of(model))


class Feature(Pruner):
    """A new pruner: score = abs(w_ij) * ||X_j||^2, compared within each layer."""

    statistic = "input_norms"
    allocation = "layer"

    def __init__(self, power: float = 1.0):
        self.power = power

    def score(self, weight, statistic, generator):
        return weight.abs() ** self.power * statistic.float()


def test_a_new_pruner_is_a_class_with_a_score(view, batches):
    pruner = pruners.build(Feature, power=2.0)
    statistics = pruner.measure(view, CalibrationPass(batches)).statistics["input_norms"]
    for sparsity, masks in pruner.prune(view, batches, SPARSITIES):
        for layer, weight in view.weights.items():
            score = weight.matrix().abs() ** 2 * statistics[layer].float()
            assert same({layer: masks[layer]}, lowest({layer: score}, budget(sparsity, weight.numel)))
    with pytest.raises(ValueError, match="has no option 'strength'; it has: power"):
        pruners.build(Feature, strength=1)


class Broken(Pruner):
    def score(self, weight, statistic, generator):
        return weight / (weight.shape[0] - 6)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, {"sparsities": ["0.5"]}),
        ({"pool": "row"}, {"sparsities": ["0.5"]}),
        ({"allocation": "global", "scope": "row"}, {"sparsities": ["0.5"]}),
        ({}, {"sparsities": None, "pattern": NM(2, 4)}),
    ],
)
def test_nan_or_inf_in_a_score_names_the_layer(view, options, how):
    with pytest.raises(ValueError, match="layer 'b.weight' hold NaN or Inf"):
        list(pruners.build(Broken, **options).prune(view, None, **how))


def test_data_is_read_once_for_all_sparsities_and_only_when_needed(view, batches):
    reads = []
    source = (reads.append(i) or batch for i, batch in enumerate(batches))
    assert len(list(pruners.build("multiflow").prune(view, source, SPARSITIES))) == 3
    assert reads == [0, 1]
    untouched = (reads.append(i) or batch for i, batch in enumerate(batches))
    list(pruners.build("omp").prune(view, untouched, SPARSITIES))
    assert reads == [0, 1]
    with pytest.raises(ValueError, match="'multiflow' needs calibration data"):
        list(pruners.build("multiflow").prune(view, None, SPARSITIES))


def test_progress_wraps_the_batches(view, batches):
    seen = []
    shown = CalibrationPass(batches, progress=lambda items: seen.append(len(items)) or items)
    pruners.build("multiflow").measure(view, shown)
    assert seen == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": None}, "at least one sparsity"),
        ({"sparsities": ["0.5"], "pattern": NM(2, 4)}, "pattern 2:4 says how many"),
        ({"sparsities": None, "pattern": NM(2, 4), "groups": {"text": 0.5}}, "pattern 2:4 decides what each group"),
        ({"sparsities": None, "pattern": NM(1, 5)}, "5 divides the inputs of no layer, which are 4, 6, 8, 12: choose"),
        ({"sparsities": ["63"]}, "fraction between 0 and 1"),
        ({"sparsities": ["0.5"], "groups": {"audio": 0.5}}, "--group_sparsity audio: the model has the groups vision"),
        ({"sparsities": ["0.5"], "groups": {"vision": 0.99}}, "which leaves -?[0-9]+ for the other"),
    ],
)
def test_options_that_cannot_be_are_errors_before_data_is_read(view, options, message):
    def unread():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ValueError, match=message):
        list(pruners.build("multiflow").prune(view, unread(), **options))


def test_the_list_of_pruners_is_the_list_of_files():
    assert {"rand", "omp", "localmp", "l2", "lamp", "multiflow"} <= set(pruners.available())
    for name in pruners.available():
        assert pruners.build(name).name == name
    with pytest.raises(ValueError, match="no pruner 'multflow', did you mean 'multiflow'"):
        pruners.build("multflow")
    with pytest.raises(ValueError, match="pool must be one of"):
        pruners.build("omp", pool="column")
    with pytest.raises(ValueError, match="pruner 'omp' has no option 'lambda_'"):
        pruners.build("omp", lambda_=1)


@pytest.mark.parametrize(
    "bases", [{"Own": Pruner, "Helper": object}, {"Own": Pruner, "Two": Pruner}, {"Helper": object}]
)
def test_a_file_has_one_pruner(monkeypatch, bases):
    """Other classes beside it are fine; two pruners, or none, are named."""
    module = types.ModuleType("pruners.own")
    for name, base in bases.items():
        setattr(module, name, type(name, (base,), {"name": "own", "__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, "pruners.own", module)
    monkeypatch.setattr(Registry, "names", lambda registry: ["own", "global"])
    if bases == {"Own": Pruner, "Helper": object}:
        assert pruners.build("own").name == "own"
        return
    found = "Own, Two" if "Two" in bases else "none"
    with pytest.raises(
        UserError, match=f"pruners/own.py: expected one subclass of pruners.base.Pruner, it has {found}"
    ):
        pruners.build("own")
