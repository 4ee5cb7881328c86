"""Learnable masks against the formulas of the paper, written out."""

import copy
import logging
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsity
from sparsity.learned.checkpoint import fold
from sparsity.learned.gates import candidates, gumbel, new_gate
from sparsity.learned.layer import MaskedLinear, MaskedLinearFrozen, add_prior, folded, masked_layers
from sparsity.learned.learnable_masks import LearnableMasks
from sparsity.learned.schedule import RECIPES, Recipe, progress
from sparsity.masks import Masks
from sparsity.pattern import NM
from tests.toys import Attention, Conv1D, layers, view_of

PATTERNS = [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(4, 8)]


def naive(layer, x, noise):
    """Compute the output of a layer, and its regulariser, by plain operations that autograd follows."""
    kept = candidates(layer.pattern).to(layer.gate)
    soft = torch.softmax((layer.scaling * layer.gate + noise) / layer.tau, dim=1)
    if layer.hard:
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
        soft = hard - soft.detach() + soft
    mask = (soft @ kept).view(layer.weight.shape)
    return F.linear(x, layer.weight * mask, layer.bias), (layer.weight.detach() * mask).square().sum()


def gradients(layer, x, forward, regularised):
    """Output, regulariser and the gradients of x, weight, bias and gate of a loss that depends on both."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, norm = forward(x)
    (y.square().mean() - (0.01 * norm if regularised else 0)).backward()
    return y, norm, x.grad, layer.weight.grad, layer.bias.grad, layer.gate.grad


@pytest.fixture
def sampled(monkeypatch):
    """A layer in float64 with a known key, and the noise (G, C) of it."""
    monkeypatch.setattr("sparsity.learned.gates._CACHED", 40)  # several chunks

    def make(pattern, hard=False):
        torch.manual_seed(0)
        layer = MaskedLinear(16, 6, N=pattern.n, M=pattern.m, hard=hard, tau=0.7, scaling=3.0, dtype=torch.float64)
        layer.key = torch.tensor([1234567, -7654321], dtype=torch.int32)
        noise = gumbel(tuple(layer.gate.t().shape), layer.key).t().double()
        return layer, torch.randn(2, 5, 16, dtype=torch.float64), noise

    return make


@pytest.mark.parametrize("regularised", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_are_those_of_the_naive_formula(sampled, pattern, hard, regularised):
    layer, x, noise = sampled(pattern, hard)
    expected = gradients(layer, x, lambda x: naive(layer, x, noise), regularised)

    def forward(x):
        return layer(x), layer.sparse_weight_reg()

    for ours, theirs in zip(gradients(layer, x, forward, regularised), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_gets_no_gradient_and_the_gate_the_same_one(sampled):
    layer, x, noise = sampled(NM(2, 4))
    layer(x).sum().backward()
    both = layer.gate.grad.clone()
    layer.zero_grad()
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(layer.gate.grad, both)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_candidates_are_all_masks_that_keep_n(pattern):
    kept = candidates(pattern)
    assert (kept.sum(1) == pattern.n).all()
    assert {tuple(row.nonzero().flatten().tolist()) for row in kept} == set(combinations(range(pattern.m), pattern.n))


def test_noise_is_gumbel_noise_and_does_not_depend_on_chunks():
    key = torch.tensor([5, -9], dtype=torch.int32)
    noise = gumbel((6, 40_000), key)
    assert torch.equal(torch.cat([gumbel((6, 40_000), key, 0, 777), gumbel((6, 40_000), key, 777)], dim=1), noise)
    sorted_, at = noise.flatten().double().sort().values, torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    quantiles = torch.quantile(sorted_, at)
    assert (torch.exp(-torch.exp(-quantiles)) - at).abs().max() < 0.005  # its distribution function
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten()[:-1], noise.flatten()[1:]]))[0, 1])) < 0.01
    other = gumbel((6, 40_000), torch.tensor([6, -9], dtype=torch.int32))
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.01


def test_samples_follow_the_softmax_of_the_logits():
    """The Gumbel-max trick: candidate c is drawn with the probability softmax(scaling * gate)_c."""
    gate = torch.tensor([0.5, -0.3, 0.1, 0.0, 0.9, -1.0]).repeat(60_000, 1)
    noise = gumbel((6, 60_000), torch.tensor([3, 4], dtype=torch.int32)).t()
    shares = (2 * gate + noise).argmax(1).bincount(minlength=6) / 60_000
    torch.testing.assert_close(shares, (2 * gate[0]).softmax(0), atol=0.01, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_prior_is_the_formula(pattern):
    gate = new_gate(24, pattern, 0.2, torch.Generator().manual_seed(1))
    prior = pattern.keep(torch.randn(6, 4 * pattern.m))
    kept = candidates(pattern)
    agree = torch.stack([(kept * group).sum(1) for group in prior.view(-1, pattern.m).float()])
    expected = gate + 3 * gate.std() * (agree - pattern.n**2 / pattern.m)
    add_prior(gate, prior, pattern, 3.0)
    torch.testing.assert_close(gate, expected)
    strong = torch.zeros(24, len(kept)).add_(torch.randn(24, len(kept)))
    add_prior(strong, prior, pattern, 1000.0)
    layer = MaskedLinear(4 * pattern.m, 6, N=pattern.n, M=pattern.m)
    layer.gate.data = strong
    assert torch.equal(layer.mask, prior)


def test_schedules():
    assert [progress(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1] and progress(0, 1) == 0
    assert Recipe().at(0) == (10, 4, 1) and Recipe().at(1) == (100, 0.05, 1)
    assert Recipe().at(0.5) == pytest.approx((55, 2.025, 1))
    assert RECIPES["vit-1epoch"].at(0) == RECIPES["vit-1epoch"].at(1) == (100, 1, 1)
    assert RECIPES["llm"].at(0.25) == pytest.approx((200, 3.0125, 0.75)) and RECIPES["llm"].gate_std == 0.01


# A model with masks


def learning(model, pattern=PATTERNS[0], **options):
    view = view_of(model, keep_dense=("head",), loss=lambda batch, generator=None: model(batch).square().mean())
    return LearnableMasks(view, pattern, **options)


def test_weights_keep_their_names_and_the_masks_exactly_n_of_m():
    model = Attention()
    before = dict(model.state_dict())
    masks = learning(model)
    state = model.state_dict()
    assert set(state) - set(before) == {f"{name}.gate" for name in ("q", "k", "v", "up", "down", "again")}
    assert all(torch.equal(state[name], before[name]) for name in before)
    found = masks.masks()
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in found.values())
    found.check(masks.view)
    masks.detach()
    assert set(model.state_dict()) == set(before) and type(model.q) is nn.Linear
    model(torch.randn(2, 8)).sum().backward()


def test_tied_weights_share_gate_and_sample_and_count_once():
    model = Attention()
    masks = learning(model)
    assert model.up.gate is model.again.gate
    masks.draw(0)
    model.train()
    x = torch.randn(5, 8)
    torch.testing.assert_close(model.up(x) - model.up.bias, model.again(x) - model.again.bias)
    assert len(masks._terms.norms) == 1
    model(x)
    weights = {name for name, _ in masks.layers()}
    assert set(masks._terms.norms) == weights
    expected = float(sum(masks._terms.norms.values()).detach())
    assert float(masks.squared_weight().detach()) == pytest.approx(expected)


def test_samples_are_a_function_of_seed_and_step():
    x = torch.randn(5, 8)

    def run(seed, step):
        torch.manual_seed(1)
        model = Attention().train()
        masks = learning(model, seed=7)
        masks.seed = seed
        masks.draw(step)
        return model(x)

    assert torch.equal(run(0, 3), run(0, 3))
    assert not torch.equal(run(0, 3), run(0, 4)) and not torch.equal(run(0, 3), run(1, 3))


def test_a_copy_can_be_made_after_a_training_forward():
    model = Attention().train()
    masks = learning(model)
    masks.draw(0)
    x = torch.randn(5, 8)
    y = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    (y.sum() + masks.squared_weight()).backward()
    assert copied.q.gate is not model.q.gate and copied.up.gate is copied.again.gate
    assert copied.q.gate.stride() == model.q.gate.stride()


def test_evaluation_follows_the_gate():
    model = Attention().eval()
    masks = learning(model)
    x = torch.randn(5, 8)
    for _ in range(3):
        with masks.masks().applied(masks.view):
            for layer in dict(masked_layers(model)).values():
                layer.folded = True
            expected = model(x)
            for layer in dict(masked_layers(model)).values():
                layer.folded = False
        torch.testing.assert_close(model(x), expected)
        with folded(model):
            assert torch.equal(model.q.weight == 0, ~model.q.mask)
            torch.testing.assert_close(model(x), expected)
        for gate in masks.gates.values():
            gate.data.copy_(torch.randn_like(gate))  # which no version counter sees


def test_the_folded_model_goes_back_after_an_exception():
    model = Attention().eval()
    learning(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), folded(model):
        raise RuntimeError
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(layer.folded for _, layer in masked_layers(model))


def test_conv1d():
    torch.manual_seed(0)
    model = nn.ModuleDict({"c": Conv1D(12, 8)})
    plain = nn.Linear(8, 12)
    plain.weight.data, plain.bias.data = model["c"].weight.data.t().contiguous(), model["c"].bias.data.clone()
    views = [view_of(model), view_of(nn.ModuleDict({"c": plain}))]
    masks = [LearnableMasks(view, NM(2, 4), seed=3) for view in views]
    x = torch.randn(4, 8)
    for each in masks:
        each.draw(1)
        each.view.model.train()
        each.view.model["c"](x).square().sum().backward()
    ours, theirs = (each.view.model["c"] for each in masks)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.gate.grad, theirs.gate.grad)
    torch.testing.assert_close(ours.parameter.grad, theirs.parameter.grad.t())
    assert torch.equal(masks[0].masks()["c.weight"], masks[1].masks()["c.weight"].t())
    masks[0].detach()
    assert type(ours) is Conv1D


def test_layers_that_do_not_divide_stay_dense(caplog):
    model = layers((6, 8), (8, 6))
    with caplog.at_level(logging.WARNING):
        masks = LearnableMasks(view_of(model), NM(2, 4))
    assert "b.weight (6 inputs)" in caplog.text and "a.weight" not in caplog.text
    assert type(model["b"]) is nn.Linear and masks.masks()["b.weight"].all()
    with pytest.raises(ValueError, match="no layer of this model divides into groups of 16"):
        LearnableMasks(view_of(layers((4, 8))), NM(4, 16))


def test_priors_that_cannot_be():
    model = layers((4, 8))
    masks = LearnableMasks(view_of(model), NM(2, 4))
    with pytest.raises(ValueError, match="the prior is not 2:4: it keeps 3 of 4"):
        masks.start_from(Masks({"a.weight": NM(3, 4).keep(torch.randn(4, 8))}), 3)
    with pytest.raises(ValueError, match="do not fit this model"):
        masks.start_from(Masks({"z.weight": torch.ones(4, 8, dtype=torch.bool)}), 3)
    for n, m in ((4, 4), (5, 4), (0, 4)):
        with pytest.raises(ValueError, match="1 <= N < M"):
            MaskedLinear(8, 4, N=n, M=m)


def test_only_gates_learn_and_a_gate_without_gradient_is_named():
    model = Attention().train()
    masks = learning(model)
    masks.freeze_weights()
    masks.draw(0)
    model(torch.randn(3, 8)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{name}.gate" for name in ("q", "k", "v", "up", "down")
    }
    masks.check_gradients()
    model.q.gate.grad = None
    with pytest.raises(ValueError, match="q.weight"):
        masks.check_gradients()


def test_bfloat16_autocast():
    torch.manual_seed(0)
    layer, x = MaskedLinear(16, 8), torch.randn(4, 16, requires_grad=True)
    layer.key = torch.tensor([1, 2], dtype=torch.int32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.02, rtol=0.02)
    half.sum().backward()
    assert layer.gate.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_what_is_kept_for_the_backward_pass_is_there_anyway():
    layer, x = MaskedLinear(64, 32), torch.randn(4, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, layer.weight, layer.gate, layer.setting)}
    extra = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in extra) == 2  # the key


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, lambda: nn.LayerNorm(16), nn.Tanh])
def test_inputs_that_are_computed_again_give_the_same_gradients(sampled, monkeypatch, make, frozen):
    monkeypatch.setattr("sparsity.learned.autograd.Again.ROWS", 3)
    layer, x, _ = sampled(NM(2, 4))
    maker = make().double()
    layer.weight.requires_grad_(not frozen)

    def gradients_with(kept):
        layer.zero_grad()
        source, extra = x.clone().requires_grad_(), []
        made = maker(source)
        with monkeypatch.context() as patch:
            patch.setattr("sparsity.learned.autograd.Again.of", staticmethod(lambda x, dtype: None)) if kept else None
            y = layer(made)
        extra = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
        y.square().sum().backward()
        return len(extra), [source.grad, layer.gate.grad, layer.bias.grad]

    (with_input, expected), (without, found) = gradients_with(True), gradients_with(False)
    assert with_input == 1 and without == int(make is nn.Tanh)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_checkpointed_blocks():
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(8), MaskedLinear(8, 8), nn.GELU(), MaskedLinear(8, 8))
    for number, layer in enumerate((block[1], block[3])):
        layer.key = torch.tensor([number, 7], dtype=torch.int32)
    x, found = torch.randn(5, 8, requires_grad=True), []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([layer.gate.grad.clone() for layer in (block[1], block[3])])
    torch.testing.assert_close(*found)


# The names of the public code


def test_the_quick_start():
    model = Attention()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model = sparsity.utils.replace_linear_with_(
        model, sparsity.maskllm.MaskedLinear, exclude=[model.head], N=1, M=4, hard=True
    )
    assert type(model.head) is nn.Linear and type(model.q) is MaskedLinear
    assert model.q.pattern == NM(1, 4) and model.q.hard and "mask=1:4" in repr(model)
    assert model.again.weight is model.up.weight and model.again.gate is model.up.gate
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    model.train()
    first, second = (model(torch.ones(2, 8)) for _ in range(2))
    assert not torch.equal(first, second)
    model.q.tau, model.q.scaling = 0.5, 20
    assert (model.q.tau, model.q.scaling) == (0.5, 20)
    first.sum().backward()
    assert model.q.gate.grad.abs().sum() > 0
    assert (model.q.mask.view(-1, 4).sum(1) == 1).all()


def test_the_quick_start_keeps_what_a_layer_is():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    model[0].weight.requires_grad_(False)
    sparsity.utils.replace_linear_with_(model, sparsity.maskllm.MaskedLinearFrozen, exclude=[model[1]])
    assert type(model[0]) is MaskedLinearFrozen and not model[0].training and not model[0].weight.requires_grad
    model[0].mask[:, ::2] = 0
    x = torch.randn(3, 8)
    x[:, 1::2] = 0
    torch.testing.assert_close(model[0](x), model[0].bias.expand(3, 8))


def test_the_quick_start_says_what_it_leaves_out(caplog):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with caplog.at_level(logging.WARNING):
        sparsity.utils.replace_linear_with_(model, MaskedLinear)
    assert "0 (6 inputs)" in caplog.text and type(model[0]) is nn.Linear and type(model[1]) is MaskedLinear
    attention = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ValueError, match="self_attn: nn.MultiheadAttention"):
        sparsity.utils.replace_linear_with_(attention, MaskedLinear)
    sparsity.utils.replace_linear_with_(attention, MaskedLinear, exclude=[attention.self_attn])
    assert type(attention.linear1) is MaskedLinear


# Checkpoints


def test_fold_reads_what_the_public_code_saves():
    torch.manual_seed(0)
    weight, gate = torch.randn(4, 8), torch.randn(8, 6)
    options = torch.tensor(
        [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.float32
    )
    expected = weight * options[gate.argmax(1)].view(4, 8)
    stale = torch.ones(4, 8)
    state = {"norm.weight": torch.ones(8), "fc.weight": weight, "fc.bias": torch.ones(4)}
    learned = {**state, "fc.gate": gate, "fc.mask": stale}
    fixed = {**state, "fc.mask": (expected != 0).float()}
    language = {**state, "fc.mask": stale, "fc.diff_mask.gate": gate, "fc.diff_mask.mask_options": options[None]}
    prefixed = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in learned.items()}}
    for given in (learned, fixed, language, prefixed, {"state_dict": learned, "args": {}}):
        dense = fold(given)
        assert set(dense) == set(state)
        assert torch.equal(dense["fc.weight"], expected) and torch.equal(dense["fc.bias"], state["fc.bias"])
    assert fold(state).keys() == state.keys()


def test_fold_of_a_model_with_masks_is_what_it_evaluates():
    model = Attention().eval()
    masks = learning(model, NM(1, 4))
    with folded(model):
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items() if "gate" not in name}
    dense = fold(model.state_dict(), N=1, M=4)
    assert dense.keys() == expected.keys() and all(torch.equal(dense[name], expected[name]) for name in dense)
    plain = Attention().eval()
    plain.load_state_dict(dense)
    x = torch.randn(4, 8)
    torch.testing.assert_close(plain(x), model(x))
    for name, mask in masks.masks().items():
        assert torch.equal(dense[name] != 0, mask)


def test_fold_says_what_does_not_fit():
    weight, gate = torch.randn(4, 8), torch.randn(8, 4)
    with pytest.raises(ValueError, match="fc.gate has 4 candidates, which is 1:4 or 3:4: say which"):
        fold({"fc.weight": weight, "fc.gate": gate})
    mask = NM(3, 4).keep(torch.randn(4, 8)).float()
    assert (fold({"fc.weight": weight, "fc.gate": gate, "fc.mask": mask})["fc.weight"] != 0).sum() == 24
    assert (fold({"fc.weight": weight, "fc.gate": gate}, N=1)["fc.weight"] != 0).sum() == 8
    for broken in ({"fc.gate": gate}, {"fc.weight": weight, "fc.gate": gate[:3]}, {"a": 1}):
        with pytest.raises(ValueError, match="checkpoint|does not fit"):
            fold(broken)
    with pytest.raises(ValueError, match="does not fit"):
        fold({"fc.weight": weight, "fc.gate": torch.randn(8, 6)}, M=8)
    with pytest.raises(ValueError, match="straddle"):
        fold({"fc.weight": torch.randn(4, 6), "fc.gate": torch.randn(6, 6)})
