"""Learned scores against a naive training loop, exact at every step, without a trace."""

import copy
from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn

from sparsity.allocation.budget import budget
from sparsity.learned import scores as learned_scores
from sparsity.learned.scores import learn, start_from_magnitude
from sparsity.masks import model_digest
from sparsity.pattern import NM
from sparsity.statistics.gradients import batch_generator
from tests.sparsity.learned.choices import choice
from tests.toys import Attention, Conv1D, Ranks, layers, view_of

SPARSITY = "0.57"


class Toy(nn.Module):
    """Tied weights, a Conv1D, dropout, a batch norm, a parameter that the forward clamps; two heads of depth."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(8)
        self.conv = Conv1D(5, 3)
        self.dropout, self.norm = nn.Dropout(dropout), nn.BatchNorm1d(5)
        self.temp = nn.Parameter(torch.tensor(2.0))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        self.temp.data.clamp_(0, 1)
        return self.norm(self.dropout(self.conv(self.attention(x)))).square().mean() * self.temp


def toy(dropout=0.0):
    """View of a toy in float64, and six batches."""
    model = Toy(dropout).double().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(6)]
    return view_of(model, keep_dense=["attention.head"], loss=lambda batch, _: model(batch)), batches


def trained(view, batches, sparsity=SPARSITY, *, pattern=None, allocation="global", **options):
    scores = start_from_magnitude(view, sparsity, pattern)
    options = {"rounds": [1] * len(batches), "lr": 0.02, "weight_decay": 0.01} | options
    return learn(view, scores, choice(view, sparsity, pattern=pattern, allocation=allocation), batches, **options)


def lowest(scores, count):
    """Kept, by a stable sort of everything: of equal scores the first go."""
    flat = torch.cat([score.abs().flatten() for score in scores.values()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:count]] = False
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}


class Straight(torch.autograd.Function):
    """mask(m), with the gradient of m = that of the mask * sign(m), sign(0) = 1."""

    @staticmethod
    def forward(ctx, score, mask):
        ctx.save_for_backward(score)
        return mask.to(score.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (score,) = ctx.saved_tensors
        return gradient * torch.where(score >= 0, 1.0, -1.0).double(), None


def naive(view, batches, rounds, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    """The scores after every step, by autograd through the masked weights and AdamW spelt out."""
    model = copy.deepcopy(view.model).train()
    dense = {name: weight.matrix().clone() for name, weight in view.weights.items()}
    scores, count = start_from_magnitude(view, SPARSITY), budget(SPARSITY, view.numel)
    first = {name: torch.zeros_like(score) for name, score in scores.items()}
    second = copy.deepcopy(first)
    history, batches = [copy.deepcopy(scores)], iter(batches)
    for t, own in enumerate(rounds):
        leaves = {name: score.clone().requires_grad_() for name, score in scores.items()}
        masks = lowest(scores, count)
        used = {name: dense[name] * Straight.apply(leaves[name], masks[name]) for name in leaves}
        used = {name: w.t() if view.weights[name].transposed else w for name, w in used.items()}
        loss = sum(torch.func.functional_call(model, used, (next(batches),)) for _ in range(own)) / own
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        rate = lr * (1 - t / len(rounds))
        for name, g in gradients.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            step = first[name] / (1 - betas[0] ** (t + 1))
            step = step / ((second[name] / (1 - betas[1] ** (t + 1))).sqrt() + eps)
            scores[name] = scores[name] * (1 - rate * decay) - rate * step
        history.append(copy.deepcopy(scores))
    return history


# What is computed


@pytest.mark.parametrize("rounds", [[1] * 6, [2, 2, 2], [3, 1, 2]])
def test_scores_are_those_of_a_naive_loop(rounds):
    view, batches = toy()
    history = naive(view, batches, rounds, lr=0.02, decay=0.01)
    scores = trained(view, batches, rounds=rounds)
    assert list(scores) == list(view.weights) and "attention.again.weight" not in scores
    for name, score in scores.items():
        assert score.shape == view.weights[name].shape
        torch.testing.assert_close(score, history[-1][name], rtol=1e-9, atol=1e-12)
    masks = [lowest(step, budget(SPARSITY, view.numel)) for step in history]
    assert any((masks[-1][name] & ~masks[0][name]).any() for name in scores), "no pruned weight came back"


def test_first_scores():
    view, _ = toy()
    flat = torch.cat([weight.matrix().abs().flatten() for weight in view.weights.values()])
    tau = flat.sort().values[budget(SPARSITY, view.numel) - 1]
    for name, score in start_from_magnitude(view, SPARSITY).items():
        magnitude = view.weights[name].matrix().abs()
        kept = lowest({name: magnitude}, budget(SPARSITY, magnitude.numel()))[name]
        assert torch.equal(score, torch.where(kept, 2 * tau, 0.0))


def test_the_sign_of_zero_is_plus():
    """A pruned weight's first step goes against gradient * weight, to either side."""
    view = view_of(layers((5, 3)))
    view._loss = lambda batch, _: view.model["a"](batch).sum()
    weight = view.weights["a.weight"].matrix()
    x = torch.tensor([[1.0, -2.0, 3.0]])
    start = start_from_magnitude(view, "0.5")["a.weight"]
    score = trained(view, [x], "0.5", lr=1e-3, weight_decay=0.0)["a.weight"]
    moved = score - start
    torch.testing.assert_close(moved, -1e-3 * torch.sign(x * weight), rtol=1e-3, atol=0)
    assert (start == 0).any() and (score[start == 0] < 0).any() and (score[start == 0] > 0).any()


# How many go


def zeros_at_each_step(view, batches, **options):
    """Masked weights of each layer, as the loss sees them."""
    seen, inner = [], view._loss

    def counting(batch, generator):
        seen.append({name: int((weight.matrix() == 0).sum()) for name, weight in view.weights.items()})
        return inner(batch, generator)

    view._loss = counting
    trained(view, batches, **options)
    return seen


@pytest.mark.parametrize("sparsity", ["0.01", "0.3", "0.57", "0.9"])
def test_every_step_prunes_exactly_as_many(sparsity):
    view, batches = toy()
    seen = zeros_at_each_step(view, batches, sparsity=sparsity)
    assert len(seen) == 6 and {sum(step.values()) for step in seen} == {budget(sparsity, view.numel)}


def test_every_step_keeps_to_the_pool_and_to_the_pattern():
    view, batches = toy()
    for step in zeros_at_each_step(view, batches, allocation="layer"):
        assert step == {name: budget(SPARSITY, weight.numel) for name, weight in view.weights.items()}
    view, batches = toy()
    for step in zeros_at_each_step(view, batches, sparsity="0.5", pattern=NM(2, 4)):
        fits = {name: weight.shape[1] % 4 == 0 for name, weight in view.weights.items()}
        assert step == {name: weight.numel // 2 * fits[name] for name, weight in view.weights.items()}
        assert set(fits.values()) == {True, False}


def test_ties_at_the_start_are_broken_in_order():
    """All that survive in their layers tie: of them, too, the first go, as many as the layers' floors leave over."""
    model = layers(*[(3, 3)] * 8)
    view = view_of(model, loss=lambda batch, _: sum(layer(batch).sum() for layer in model.values()))
    before = {name: weight.matrix() for name, weight in view.weights.items()}
    first = []

    def loss(batch, _):
        first.append({name: view.weights[name].matrix() != 0 for name in before})
        return sum(layer(batch).sum() for layer in model.values())

    view._loss = loss
    trained(view, [torch.ones(1, 3)], "0.5")
    layerwise = {name: lowest({name: w}, 4)[name] for name, w in before.items()}  # floor(0.5 * 9) of each
    expected, spare = {}, budget("0.5", 72) - 8 * 4
    for name, kept in layerwise.items():
        flat = kept.flatten().clone()
        gone = flat.nonzero().flatten()[:spare]
        flat[gone], spare = False, spare - len(gone)
        expected[name] = flat.view(3, 3)
    assert spare == 0 and all(torch.equal(first[0][name], expected[name]) for name in before)


# No trace


def state(view):
    """All that a training could leave behind."""
    model = view.model
    return {
        "digest": model_digest(view),
        "values": {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=False).items()},
        "storage": {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()},
        "objects": [id(p) for p in model.parameters()],
        "flags": [(p.requires_grad, p.grad if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    assert torch.equal(before["random"], after["random"])
    for (flag, gradient), (flag_now, gradient_now) in zip(before["flags"], after["flags"], strict=True):
        assert flag == flag_now and (gradient is gradient_now is None or torch.equal(gradient, gradient_now))
    for key in ("digest", "storage", "objects", "training"):
        assert before[key] == after[key]


@pytest.fixture
def marked():
    """A toy whose state is unlike what a training needs, and batches."""
    view, batches = toy(dropout=0.3)
    view.model.train()
    view.model.norm.eval()
    view.model.conv.weight.requires_grad_(False)
    view.model.attention.q.weight.grad = torch.ones(8, 8, dtype=torch.float64)
    return view, batches


def test_no_trace(marked):
    view, batches = marked
    before = state(view)
    trained(view, batches)
    assert_same(before, state(view))
    assert all(view.model.modes) and view.model.modes


def test_no_trace_after_an_exception(marked):
    view, batches = marked
    before = state(view)
    with pytest.raises(RuntimeError, match="shape"):
        trained(view, [*batches[:3], torch.ones(4, 7, dtype=torch.float64)])
    assert_same(before, state(view))


def test_no_trace_in_large_weights():
    model = layers((300, 300))
    view = view_of(model, loss=lambda batch, _: model["a"](batch).square().sum())
    before = state(view)
    trained(view, [torch.randn(2, 300, generator=torch.Generator().manual_seed(0))] * 2)
    assert_same(before, state(view))


# What is drawn


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_on_and_a_function_of_the_generators():
    view, batches = toy(dropout=0.5)
    first = trained(view, batches)
    torch.manual_seed(99)
    assert same(first, trained(view, batches))
    assert not same(first, trained(*toy(dropout=0.0)))
    assert same(first, trained(view, batches, generators=partial(batch_generator, 42)))
    assert not same(first, trained(view, batches, generators=partial(batch_generator, 43)))


@pytest.mark.parametrize(
    "shares",
    [
        [[(0, 1), (), (4, 5)], [(), (2, 3), ()]],  # whole rounds
        [[(0,), (2,), (4,)], [(1,), (3,), (5,)]],  # a batch of each round
        [[(0, 1), (2, 3), (4, 5)], [(), (), ()]],  # a rank without any
    ],
)
def test_ranks_together_learn_what_one_does(monkeypatch, shares):
    monkeypatch.setattr(learned_scores, "_seeded", lambda *_: torch.enable_grad())  # threads share the random state
    view, batches = toy()
    alone = trained(view, batches, rounds=[2, 2, 2])
    views, results, reduce = [toy()[0] for _ in shares], [None, None], Ranks(2)

    def rank(number):
        share = shares[number]
        own = [batches[i] for part in share for i in part]
        results[number] = trained(views[number], own, rounds=[len(part) for part in share], reduce=reduce)

    threads = [Thread(target=rank, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(results[0], results[1])
    for name, score in alone.items():
        torch.testing.assert_close(results[0][name], score, rtol=1e-9, atol=1e-12)


def test_half_precision_sees_the_masks_of_each_step():
    """Autocast holds weights that it has converted: those of the step before must not be used."""
    model = layers((6, 8), (4, 6))
    view = view_of(model, loss=lambda batch, _: model["b"](model["a"](batch).relu()).float().square().mean())
    batches = torch.randn(8, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = trained(view, batches)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(trained(view, batches), expected)


def test_scores_of_half_precision_weights_are_not_half():
    model = layers((6, 8)).bfloat16()
    view = view_of(model, loss=lambda batch, _: model["a"](batch).float().square().mean())
    start = start_from_magnitude(view, "0.5")["a.weight"].clone()
    score = trained(view, [torch.ones(2, 8, dtype=torch.bfloat16)], "0.5", lr=1e-6)["a.weight"]
    assert score.dtype == torch.float32 and (score != start).all()


# What cannot be


def test_errors_name_what_is_wrong():
    view, batches = toy()
    with pytest.raises(ValueError, match="there are no calibration batches"):
        trained(view, [], rounds=[2, 2])
    for pattern in (None, NM(2, 4)):
        with pytest.raises(ValueError, match="the gradient of layer 'attention.q.weight' holds NaN or Inf"):
            trained(view, [batches[0] * float("nan"), batches[1]], "0.5", pattern=pattern)
    view._loss = lambda batch, _: view.model.attention.q(batch).sum()
    with pytest.raises(ValueError, match=r"'attention\.k\.weight', .*'conv.weight' got no gradient"):
        trained(view, batches)


def test_a_round_that_could_not_be_read_is_no_step():
    view, batches = toy()
    rounds = [1, 1, 0]
    history = naive(view, batches[:2], [1, 1], lr=0.02, decay=0.01)
    scores = trained(view, batches[:2], rounds=rounds)
    assert not same(scores, history[-1])  # the rate of three rounds
    assert same(trained(view, batches[:2], rounds=[1, 1, 1]), scores)


def test_weights_that_are_pruned_already_are_refused():
    view, batches = toy()
    with torch.no_grad():
        for weight in view.weights.values():
            weight.parameter[: len(weight.parameter) // 2 + 1] = 0
    with pytest.raises(ValueError, match="weights are 0 already: ask for a higher sparsity"):
        trained(view, batches, "0.3")
    trained(view, batches, "0.9")
