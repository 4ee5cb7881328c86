"""The Hessian of a layer's inputs and SparseGPT's sweep, against the formulas of arXiv 2301.00774 in float64."""

import logging
from functools import partial

import pytest
import torch

from sparsity.allocation.budget import budget
from sparsity.pattern import NM
from sparsity.reconstruction.sparsegpt import reconstruct, saliency
from sparsity.selection import keep_within
from sparsity.statistics.hessian import DAMPING, factor, gram, triangle
from sparsity.statistics.passes import collect
from tests.toys import Attention, layers, view_of


def inputs(tokens, width, seed=0, dtype=torch.float64):
    """Correlated features of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width))
    return (rows * torch.rand(width, generator=generator, dtype=torch.float64).add(0.1)).to(dtype)


def hessian_of(rows):
    return 2 / len(rows) * gram(rows).double()  # strips


def factored(rows):
    return factor(hessian_of(rows), rows.shape[1], "layer", rows.dtype)


def root(found):
    """R from S and the diagonal."""
    return found.unit(slice(0, len(found.live))) * found.diagonal[:, None]


def weights(outputs, width, seed=1, dtype=torch.float64):
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(weight, rows, sparsity=None, pattern=None, update=True):
    """Column by column, with the inverse spelt out: (kept, weights)."""
    W, X = weight.clone(), rows.t()
    H = 2 / X.shape[1] * X @ X.t()
    live = H.diagonal() > 0
    W[:, ~live] = 0
    H += DAMPING * H.diagonal()[live].mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    kept = torch.ones_like(W, dtype=torch.bool)
    group = pattern.m if pattern else 128
    for j in range(W.shape[1]):
        if j % group == 0:
            scores = W[:, j : j + group] ** 2 / U.diagonal()[j : j + group] ** 2
            if pattern:
                order = scores.argsort(dim=1, stable=True)[:, : pattern.m - pattern.n]
                kept[:, j : j + group].scatter_(1, order, False)
            else:
                order = scores.flatten().argsort(stable=True)[: budget(sparsity, scores.numel())]
                chosen = torch.ones(scores.numel(), dtype=torch.bool)
                chosen[order] = False
                kept[:, j : j + group] = chosen.view(scores.shape)
        q = W[:, j] * kept[:, j]
        if update:
            W[:, j:] -= torch.outer((W[:, j] - q) / U[j, j], U[j, j:])
        W[:, j] = q
    return kept, W


def test_the_upper_triangle_is_that_of_the_product():
    for width in (5, 130, 300):
        rows = inputs(40, width)
        torch.testing.assert_close(triangle(gram(rows), width), (rows.t() @ rows).triu(), rtol=1e-12, atol=1e-12)
    assert gram(rows.bfloat16()).dtype == torch.float32


def test_bf16_arithmetic_of_the_forward_does_not_reach_the_sum():
    rows = inputs(40, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gram(rows)
    assert torch.equal(found, gram(rows))


def test_one_factorisation_gives_the_factor_of_the_inverse():
    rows = inputs(200, 24)
    H = 2 / 200 * rows.t() @ rows
    H += DAMPING * H.diagonal().mean() * torch.eye(24, dtype=H.dtype)
    R = root(factor(hessian_of(rows), 24, "layer", torch.float64))
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R @ R.t(), H)
    torch.testing.assert_close(torch.linalg.inv(R), torch.linalg.cholesky(torch.linalg.inv(H), upper=True))


def test_more_damping_where_the_factorisation_fails(caplog):
    bad = torch.tensor([1.0, 1.05, 0.0, 1.0])  # no Hessian: its least eigenvalue is -0.05
    with caplog.at_level(logging.WARNING):
        R = root(factor(bad, 2, "blocks.3.fc", torch.float64))
    torch.testing.assert_close(R @ R.t(), torch.tensor([[1.1, 1.05], [1.05, 1.1]], dtype=torch.float64))
    (record,) = caplog.records
    assert "'blocks.3.fc'" in record.getMessage() and "0.1" in record.getMessage()
    with pytest.raises(ValueError, match="'blocks.3.fc'"):
        factor(torch.full((4,), float("inf")), 2, "blocks.3.fc")


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 16), NM(24, 32), NM(20, 40)], ids=str)
def test_updated_weights_of_a_pattern(pattern):
    weight, rows = weights(12, 160), inputs(400, 160)
    kept, updated = reconstruct(weight, factored(rows), None, pattern)
    expected, values = naive(weight, rows, pattern=pattern)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(updated, values, rtol=1e-8, atol=1e-10)
    assert (updated[~kept] == 0).all()
    assert (kept.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()


@pytest.mark.parametrize("sparsity", ["0.5", "0.63", "0.9"])
def test_updated_weights_without_a_pattern(sparsity):
    weight, rows = weights(9, 300), inputs(500, 300)
    kept, updated = reconstruct(weight, factored(rows), sparsity)
    expected, values = naive(weight, rows, sparsity)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(updated, values, rtol=1e-8, atol=1e-10)
    gone = [budget(sparsity, 9 * columns) for columns in (128, 128, 44)]
    assert [int((~part).sum()) for part in kept.split(128, dim=1)] == gone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_without_an_update_have_a_closed_form(dtype):
    weight, rows = weights(16, 256, dtype=dtype), inputs(600, 256, dtype=dtype)
    score = saliency(weight, factored(rows))
    for pattern in (NM(2, 4), NM(4, 8)):
        expected, values = naive(weight.double(), rows.double(), pattern=pattern, update=False)
        assert torch.equal(pattern.keep(score), expected) and torch.equal(values, weight * expected)
    expected, _ = naive(weight.double(), rows.double(), "0.63", update=False)
    assert torch.equal(keep_within("layer", score, "block", partial(budget, "0.63")), expected)


def test_the_compute_block_changes_nothing():
    weight, rows = weights(12, 192), inputs(400, 192)
    for target in ({"pattern": NM(2, 4), "sparsity": None}, {"sparsity": "0.5"}):
        kept, updated = reconstruct(weight, factored(rows), **target)
        for computed in (1, 32, 1000):
            other, values = reconstruct(weight, factored(rows), **target, computed=computed)
            assert torch.equal(kept, other)
            torch.testing.assert_close(updated, values, rtol=1e-9, atol=1e-11)


def test_float32_differs_from_float64_by_rounding_alone():
    weight, rows = weights(48, 384, dtype=torch.float32), inputs(1500, 384, dtype=torch.float32)
    kept, updated = reconstruct(weight, factored(rows), None, NM(2, 4))
    expected, values = naive(weight.double(), rows.double(), pattern=NM(2, 4))
    same = kept == expected
    assert same.double().mean() > 0.999
    rows_alike = same.all(dim=1)
    assert rows_alike.sum() > 40
    torch.testing.assert_close(updated[rows_alike].double(), values[rows_alike], rtol=1e-3, atol=1e-3)


def test_the_update_makes_the_error_of_the_layer_smaller():
    weight, rows = weights(32, 128), inputs(600, 128)
    kept, updated = reconstruct(weight, factored(rows), None, NM(2, 4))
    magnitude = NM(2, 4).keep(weight.abs())
    errors = [(rows @ (weight - w).t()).square().sum() for w in (updated, weight * kept, weight * magnitude)]
    assert errors[0] < 0.8 * errors[1] and errors[0] < 0.8 * errors[2]


def test_dead_columns_have_zero_weights():
    weight, rows = weights(6, 32), inputs(100, 32)
    rows[:, [1, 2, 3, 17]] = 0
    score = saliency(weight, factored(rows))
    assert (score[:, [1, 2, 3, 17]] == 0).all() and (score[:, 0] > 0).all()
    for target in ({"pattern": NM(2, 4), "sparsity": None}, {"sparsity": "0.5"}):
        kept, updated = reconstruct(weight, factored(rows), **target)
        expected, values = naive(weight, rows, **target)
        assert torch.equal(kept, expected)
        torch.testing.assert_close(updated, values, rtol=1e-8, atol=1e-10)
        assert (updated[:, [1, 2, 3, 17]] == 0).all()


def test_a_layer_whose_inputs_are_all_zero():
    kept, updated = reconstruct(weights(3, 8), factored(torch.zeros(5, 8, dtype=torch.float64)), None, NM(2, 4))
    assert (updated == 0).all() and (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_hessians_are_those_of_the_tokens_whatever_the_batches():
    model = Attention()
    view = view_of(model, keep_dense=["head"])
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(3))
    found = collect(view, "hessian", [x[:1], x[1:4], x[4:]])
    again = collect(view, "hessian", [x], names=["q.weight", "up.weight"])
    assert list(again) == ["q.weight", "up.weight"]
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(triangle(found["q.weight"], 8), (2 / 30 * rows.t() @ rows).triu(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        mixed = (torch.softmax(model.q(x) * model.k(x), dim=-1) * model.v(x)).flatten(0, 1).double()
    both = torch.cat([mixed, rows])  # `up` and `again` are one weight
    torch.testing.assert_close(triangle(found["up.weight"], 8), (2 / 60 * both.t() @ both).triu(), rtol=1e-5, atol=1e-6)
    for name, hessian in again.items():
        assert hessian.dtype == torch.float64
        torch.testing.assert_close(found[name], hessian, rtol=1e-5, atol=1e-6)


def test_patterns_by_comparing_pairs_are_those_by_sorting():
    generator = torch.Generator().manual_seed(0)
    for pattern in (NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4), NM(8, 16), NM(4, 32)):
        scores = torch.randint(0, 4, (10, 4 * pattern.m), generator=generator).float()  # with many ties
        order = scores.unflatten(1, (-1, pattern.m)).argsort(dim=-1, stable=True)
        expected = torch.ones(order.shape, dtype=torch.bool).scatter_(2, order[..., : pattern.m - pattern.n], False)
        assert torch.equal(pattern.keep(scores), expected.flatten(1))


def test_a_layer_without_inputs_is_named():
    view = view_of(layers((4, 8)), forward=lambda batch: None)
    with pytest.raises(ValueError, match="'a.weight' saw no calibration sample"):
        collect(view, "hessian", [torch.zeros(1, 8)])
