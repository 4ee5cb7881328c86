"""SparseGPT's sweep with a mask given, against the column-by-column formula, and as a reconstruction."""

import pytest
import torch

from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.sparsegpt import SparseGPT, reconstruct, reconstruct_given
from sparsity.statistics.hessian import factor
from tests.sparsity.reconstruction.problems import half_kept, hessian_of, inputs, problem_of, weights

TARGETS = [{"sparsity": "0.5"}, {"sparsity": "0.83"}] + [
    {"pattern": pattern} for pattern in (NM(2, 4), NM(1, 4), NM(12, 16), NM(24, 32), NM(20, 40))
]


def naive(weight, rows, kept, damp=0.01):
    """Column by column, with the inverse spelt out."""
    W, H = weight.clone(), 2 / len(rows) * rows.t() @ rows
    H += damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for j in range(W.shape[1]):
        q = W[:, j] * kept[:, j]
        W[:, j:] -= torch.outer((W[:, j] - q) / U[j, j], U[j, j:])
        W[:, j] = q
    return W


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(*target.values()))
def test_its_own_mask_gives_its_own_weights_to_the_bit(target, dtype):
    weight, rows = weights(13, 480, dtype=dtype), inputs(700, 480)
    problem = problem_of(weight, rows, scope="block", **target)
    kept, updated = SparseGPT().solve(problem)
    found = factor(hessian_of(rows), 480, "layer", torch.promote_types(dtype, torch.float32))
    before, values = reconstruct(weight, found, target.get("sparsity"), target.get("pattern"))
    assert torch.equal(kept, before) and torch.equal(updated, values)
    given = problem_of(weight, rows, kept=kept, pattern=target.get("pattern"))
    again, values = SparseGPT().solve(given)
    assert torch.equal(again, kept) and torch.equal(values, updated)
    assert values.dtype == dtype and (values[~kept] == 0).all()


@pytest.mark.parametrize("damp", [0.001, 0.01, 0.5])
@pytest.mark.parametrize("shape", [(9, 300), (5, 128), (3, 7)])
def test_any_mask_against_the_formula(shape, damp):
    weight, rows, kept = weights(*shape), inputs(600, shape[1]), half_kept(shape, share=0.4)
    kept[0], kept[1] = False, True
    _, updated = SparseGPT(damp=damp).solve(problem_of(weight, rows, kept=kept))
    torch.testing.assert_close(updated, naive(weight, rows, kept, damp), rtol=1e-8, atol=1e-10)
    assert (updated[0] == 0).all()


def test_a_mask_that_its_pattern_does_not_describe():
    """More may be pruned than the pattern asks for, and a layer may not divide into its groups."""
    for width in (64, 66):
        weight, rows, kept = weights(6, width), inputs(200, width), half_kept((6, width), share=0.3)
        updated = reconstruct_given(weight, factor(hessian_of(rows), width, "layer", torch.float64), kept, NM(2, 4))
        torch.testing.assert_close(updated, naive(weight, rows, kept), rtol=1e-8, atol=1e-10)


def test_the_layer_and_its_statistics_are_left_alone():
    weight, rows, kept = weights(6, 64), inputs(200, 64), half_kept((6, 64))
    problem = problem_of(weight, rows, kept=kept)
    copies = weight.clone(), problem.statistics["hessian"].clone(), kept.clone()
    SparseGPT().solve(problem)
    for now, copy in zip((weight, problem.statistics["hessian"], kept), copies, strict=True):
        assert torch.equal(now, copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_share": 0.5, "sparsity": "0.5", "scope": "block"}, "'layer'.*target dense"),
        ({"sparsity": "0.5", "scope": "row"}, "'layer'.*within a scope: block"),
        ({}, "'layer'.*within a scope: block"),
        ({"kept": torch.ones(8, 6, dtype=torch.bool)}, r"'layer'.*\(8, 6\).*\(6, 8\)"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(UserError, match=message):
        SparseGPT().solve(problem_of(weights(6, 8), inputs(20, 8), **options))
    for damp in (0, -0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="damp must be a number above 0"):
            SparseGPT(damp=damp)
