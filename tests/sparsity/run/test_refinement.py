"""Refinement by a plan once layers have masks: the dense target, biases, damping that is chosen, exchanges, errors."""

import copy

import pytest
import torch
from torch import Tensor, nn

import pruners
from models.blip import model as blip
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.reconstruction.damping import CHOICES
from sparsity.run.request import Request
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView
from tests.sparsity.reconstruction.problems import direct, error, row_errors
from tests.toys import Attention, Conv1D

pytestmark = pytest.mark.script  # long: left out of make test-fast

SOLVERS = ["lsq", "admm", "alps"]


class Net(nn.Module):
    """Three layers, each a stage, so that what a layer is measured on is what it gets in the pruned model."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = layer(8, 12), layer(12, 32), layer(32, 6)

    def forward(self, batch: Tensor) -> Tensor:
        return self.down(self.up(self.embed(batch).relu()).relu())


def view_of(model: nn.Module) -> PrunableView:
    return PrunableView(model, group_of=lambda key: "all", forward=model, blocks=[*model.children()])


@pytest.fixture
def view():
    return view_of(Net().eval().double())


def batches_of(count=5, dtype=torch.float64, samples=12):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 8, generator=generator, dtype=dtype) + 0.5 for _ in range(count)]


def once(name, view, data, sparsity="0.6", *, pattern=None, **options):
    ((_, masks),) = pruners.build(name, **options).prune(view, data, None if pattern else [sparsity], pattern=pattern)
    return masks


def inputs_of(view, data):
    """Name -> the inputs of that layer in the model as it is, (tokens, in), by hooks of our own."""
    seen = {name: [] for name in view.weights}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, weight in view.weights.items()
        for module in weight.modules
    ]
    with torch.no_grad():
        for batch in data:
            view.forward(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def both_of(view, data, masks):
    """The inputs of layers in the dense and in the pruned model."""
    dense = inputs_of(view, data)
    with masks.applied(view):
        return dense, inputs_of(view, data)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("a", [0.5, 1.0])
def test_the_dense_target_solves_its_equations(view, solver, a):
    """b_S = H_SS^-1 C_S with C = a W X'Xh + (1 - a) W Gh + lambda W, from the inputs of two models."""
    data = batches_of()
    damp = 0.01
    masks = once("wanda", view, data, reconstruct=solver, target=f"dense:{a}" if a < 1 else "dense")
    dense, pruned = both_of(view, data, masks)
    assert masks.provenance["target"] == f"dense:{a:g}"
    for name, weight in view.weights.items():
        X, Xh, W, n = dense[name], pruned[name], weight.matrix().double(), len(pruned[name])
        G = Xh.t() @ Xh / n
        live = G.diagonal() > 0
        ridge = damp * (torch.where(live, G.diagonal(), 1) if solver == "admm" else G.diagonal()[live].mean())
        H = G + torch.diag(torch.as_tensor(ridge).expand(len(G)))
        C = a * W @ (X.t() @ Xh) / n + (1 - a) * W @ G + W * ridge
        expected = direct(C, H, masks[name])
        close = 1e-2 if solver == "admm" else 1e-4  # after 20 rounds
        assert error(expected, masks.weights[name], H) < close * error(torch.zeros_like(W), expected, H), name


def test_inputs_that_agree_make_both_targets_the_same(view):
    """In the first stage nothing is pruned before."""
    data = batches_of()
    own, wanted = (once("wanda", view, data, reconstruct="lsq", target=target) for target in ("same", "dense:0.5"))
    torch.testing.assert_close(own.weights["embed.weight"], wanted.weights["embed.weight"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(own.weights["down.weight"], wanted.weights["down.weight"], rtol=1e-3, atol=1e-4)
    assert "target" not in own.provenance


@pytest.mark.parametrize("solver", [*SOLVERS, "sparsegpt"])
@pytest.mark.parametrize("target", ["same", "dense:0.5"])
@pytest.mark.parametrize("layer", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["Linear", "Conv1D"])
def test_biases_keep_the_mean_output(solver, target, layer):
    if solver == "sparsegpt" and target != "same":
        return
    view, data = view_of(Net(layer).eval()), batches_of(dtype=torch.float32)
    masks = once("wanda", view, data, "0.7", reconstruct=solver, target=target, correct_bias=True)
    dense, pruned = both_of(view, data, masks)
    assert masks.biases.keys() == {"embed.bias", "up.bias", "down.bias"}
    for name, weight in view.weights.items():
        W, bias = weight.matrix().double(), weight.modules[0].bias.double()
        new = masks.biases[name.replace("weight", "bias")].double()
        before = (dense if target != "same" else pruned)[name] @ W.t() + bias
        after = pruned[name] @ weight.as_matrix(masks.weights[name]).double().t() + new
        assert ((after.mean(0) - before.mean(0)).abs() < 1e-5 * before.std(0)).all(), (name, target)
        assert not torch.allclose(new, bias, atol=1e-3)


def test_biases_are_put_in_and_back(view, tmp_path):
    data = batches_of()
    masks = once("wanda", view, data, reconstruct="lsq", correct_bias=True)
    before = copy.deepcopy(view.model.state_dict())
    with masks.applied(view):
        for key, new in masks.biases.items():
            assert torch.equal(view.model.state_dict()[key], new)
    assert all(torch.equal(value, before[key]) for key, value in view.model.state_dict().items())
    masks.apply(view)
    assert all(torch.equal(view.model.state_dict()[key], new) for key, new in masks.biases.items())
    masks.save(tmp_path / "masks.safetensors")
    assert not Masks.load(tmp_path / "masks.safetensors").biases


def test_layers_without_a_bias_are_solved_as_they_are():
    view, data = view_of(Net(lambda i, o: nn.Linear(i, o, bias=False)).eval()), batches_of(dtype=torch.float32)
    plain, corrected = (once("wanda", view, data, reconstruct="lsq", correct_bias=c) for c in (False, True))
    assert not corrected.biases
    for name, weight in plain.weights.items():
        assert torch.equal(weight, corrected.weights[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tied_layers_in_half_precision(dtype):
    """Both biases of a weight that two layers use change alike, by the mean over all uses; to the dtype's rounding."""
    torch.manual_seed(0)
    view = view_of(Attention().eval().to(dtype))
    data = [torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(4)]
    masks = once("wanda", view, data, reconstruct="alps", correct_bias=True, target="dense", swaps=3, damp="auto")
    assert {"up.bias", "again.bias"} <= masks.biases.keys()
    changes = [masks.biases[key].double() - view.model.state_dict()[key].double() for key in ("up.bias", "again.bias")]
    torch.testing.assert_close(*changes, rtol=0, atol=4 * torch.finfo(dtype).eps)
    for name, weight in masks.weights.items():
        assert weight.dtype == dtype and weight.isfinite().all() and not weight[~masks[name]].any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("correct_bias", [False, True])
def test_damping_is_one_of_the_choices_by_layer(view, solver, correct_bias):
    data = batches_of()
    options = {"reconstruct": solver, "calibration_mode": "dense", "correct_bias": correct_bias}
    fixed = [once("wanda", view, data, damp=damp, **options) for damp in CHOICES]
    masks = once("wanda", view, data, damp="auto", **options)
    assert masks.provenance["damp"] == "auto"
    for name, weight in masks.weights.items():
        assert any(torch.equal(weight, other.weights[name]) for other in fixed)
        assert not torch.equal(fixed[0].weights[name], fixed[2].weights[name])


def test_one_sample_cannot_be_held_out(view):
    with pytest.raises(UserError, match="damp auto needs samples that are held out: give more than one"):
        once("wanda", view, batches_of(1, samples=1), reconstruct="lsq", damp="auto")


@pytest.mark.parametrize("reconstruct", ["none", "lsq", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_exchanges_keep_counts_and_make_the_error_smaller(view, pattern, reconstruct):
    data, dense = batches_of(), {"calibration_mode": "dense"}
    plain = once("wanda", view, data, pattern=pattern, **dense)
    refined = once("wanda", view, data, pattern=pattern, swaps=20, reconstruct=reconstruct, **dense)
    rows, changed = inputs_of(view, data), 0
    assert refined.provenance["swaps"] == 20 and bool(refined.weights) == (reconstruct != "none")
    for name, weight in view.weights.items():
        if pattern:
            assert (refined[name].unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert torch.equal(refined[name].sum(1), plain[name].sum(1))
        H = rows[name].t() @ rows[name] / len(rows[name])
        H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
        errors = [row_errors(weight.matrix(), weight.matrix() * m[name], H) for m in (refined, plain)]
        assert (errors[0] <= errors[1] * (1 + 1e-9)).all()
        changed += not torch.equal(refined[name], plain[name])
    assert changed


@pytest.mark.parametrize("name", ["wanda", "omp", "rand", "sparsegpt", "alps"])
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_exchanges_after_any_mask(view, name, allocation):
    data, options = batches_of(), {"allocation": allocation, "calibration_mode": "dense"}
    options |= {"reconstruct": "lsq"} if name in ("omp", "rand") else {}
    plain, refined = (once(name, view, data, swaps=swaps, **options) for swaps in (0, 5))
    assert {n: int(m.sum()) for n, m in plain.items()} == {n: int(m.sum()) for n, m in refined.items()}
    assert refined.digest() != plain.digest()


def test_exchanges_in_steps_bring_nothing_back(view):
    data, engine = batches_of(), pruners.build("wanda", epochs=3, schedule="linear", swaps=5, scope="layer")
    seen = []

    def reading(epoch):
        seen.append({name: weight.matrix() != 0 for name, weight in view.weights.items()})
        return CalibrationPass(data)

    measured = engine.measure(view, reading(0))
    ((_, masks),) = engine.masks(view, measured, Request(["0.6"]), reading)
    for larger, smaller in zip(seen[1:], [*seen[2:], dict(masks)], strict=True):
        assert all(not (smaller[name] & ~larger[name]).any() for name in masks), "what was pruned came back"


class KilledError(Exception):
    pass


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_killed_runs_go_on_with_the_same_bits(view, tmp_path, finished, monkeypatch):
    """Killed within the layers, or after them: while results are evaluated, recovered and written."""
    options = {"reconstruct": "alps", "target": "dense:0.5", "correct_bias": True, "damp": "auto", "swaps": 3}
    whole = once("wanda", view, batches_of(), **options)

    def run(limit=None):
        engine, solved = pruners.build("wanda", **options), []
        solve = engine.plan.reconstruction.solve

        def counted(problem):
            if len(solved) == limit:
                raise KilledError
            solved.append(problem.name)
            return solve(problem)

        monkeypatch.setattr(engine.plan.reconstruction, "solve", counted)
        reading = CalibrationPass(batches_of(), scratch=Scratch(tmp_path / "run", "data"))
        found = engine.masks(view, engine.measure(view, reading), Request(["0.6"]), lambda epoch: reading)
        _, masks = next(found)
        if len(solved) == limit:
            raise KilledError
        assert not list(found)
        return masks, solved

    with pytest.raises(KilledError):
        run(finished)
    again, solved = run()
    assert len(solved) == 3 - finished and again.digest() == whole.digest()
    for found, expected in ((again.weights, whole.weights), (again.biases, whole.biases), (again.errors, whole.errors)):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["same", "dense:0.5"])
def test_errors_fall_and_are_those_of_the_layers(view, target):
    data = batches_of()
    masks = once("wanda", view, data, reconstruct="lsq", target=target, layer_errors=True)
    dense, pruned = both_of(view, data, masks)
    a = 0.5 if target != "same" else 0.0
    for name, weight in view.weights.items():
        W, B = weight.matrix(), masks.weights[name]
        wanted = (a * dense[name] + (1 - a) * pruned[name]) @ W.t()
        for found, kept in zip(masks.errors[name][:2], (W * masks[name], B), strict=True):
            expected = (wanted - pruned[name] @ kept.t()).square().sum() / wanted.square().sum()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
        before, after, held_out_before, held_out_after = masks.errors[name].tolist()
        assert after < before and held_out_after < held_out_before
    assert "layer_errors" not in masks.provenance


def test_weights_are_fitted_to_every_mode_of_blip(small_blip, blip_batches):
    """Scores alone read what they always did; a reconstruction also what the text encoder gets without an image."""
    view, seen = blip.prunable_view(small_blip), []
    small_blip.text_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[2] is None))
    batches = blip_batches["general"][:2]
    once("wanda", view, batches, reconstruct="none", calibration_mode="sequential")
    assert seen and not any(seen)
    masks = once("wanda", view, batches, reconstruct="lsq", correct_bias=True, target="dense:0.5")
    assert any(seen)
    before = {key: bias.clone() for w in view.weights.values() for key, bias in w.biases.items()}
    tied = [key for w in view.weights.values() if len(w.modules) > 1 for key in w.biases]
    assert set(tied) <= masks.biases.keys() <= before.keys()
    with masks.applied(view):
        state = small_blip.state_dict()
        assert all(torch.equal(state[key], masks.biases[key]) for key in masks.biases)
    assert all(torch.equal(small_blip.state_dict()[key], bias) for key, bias in before.items())


REFUSED = [
    ("wanda", {"target": "dense"}, "--target is for what updates each layer's weights"),
    ("wanda", {"correct_bias": True}, "--correct_bias is for what updates each layer's weights"),
    ("wanda", {"layer_errors": True}, "--layer_errors is for what updates"),
    ("chita", {"target": "dense"}, "--target is for what updates each layer's weights"),
    ("chita", {"swaps": 2}, "--swaps: chita decides by itself"),
    ("wanda", {"reconstruct": "sparsegpt", "target": "dense:0.5"}, "sparsegpt knows no target but the layer's own"),
    (
        "wanda",
        {"reconstruct": "lsq", "target": "dense", "calibration_mode": "dense"},
        "is for sequential calibration",
    ),
    ("wanda", {"reconstruct": "lsq", "target": "dense", "epochs": 2}, "--target dense needs --epochs 1"),
    ("wanda", {"reconstruct": "lsq", "target": "sparse"}, "target must be same, dense, or dense:A"),
    ("wanda", {"reconstruct": "lsq", "target": "dense:2"}, "A above 0 and at most 1, got 'dense:2'"),
    ("wanda", {"swaps": -1}, "swaps must be a whole number from 0"),
    ("wanda", {"damp": "auto"}, "pruner 'wanda' has no option 'damp'"),
    ("wanda", {"reconstruct": "lsq", "damp": "often"}, "damp must be a number above 0"),
]


@pytest.mark.parametrize(("name", "options", "told"), REFUSED, ids=[str(case[1]) for case in REFUSED])
def test_refusals(name, options, told):
    with pytest.raises(UserError, match=told) as caught:
        pruners.build(name, **options)
    assert "\n" not in str(caught.value)


def test_one_call():
    model, data = Net().eval(), batches_of(dtype=torch.float32)
    options = {"reconstruct": "lsq", "target": "dense:0.5", "correct_bias": True, "damp": "auto", "swaps": 20}
    masks = pruners.prune(view_of(model), "wanda", sparsity=0.5, data=data, **options)
    assert masks.weights.keys() == masks.keys() and len(masks.biases) == 3
