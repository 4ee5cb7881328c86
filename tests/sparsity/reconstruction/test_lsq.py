"""Least squares on a given mask, against a direct solve row by row."""

import pytest
import torch

from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.equations import equations
from sparsity.reconstruction.lsq import LeastSquares
from sparsity.reconstruction.sparsegpt import SparseGPT
from sparsity.solvers.conjugate import least_squares
from tests.sparsity.reconstruction.problems import (
    damped,
    direct,
    error,
    half_kept,
    inputs,
    problem_of,
    row_errors,
    weights,
)

SHAPES = [(17, 96, 400), (5, 200, 90), (40, 64, 64)]  # (out, in, tokens): also fewer tokens than inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.2, 0.37, 0.5])
@pytest.mark.parametrize("shape", [(17, 96, 400), (40, 64, 64), (24, 256, 800)], ids=str)
def test_the_error_is_that_of_a_direct_solve(shape, share, dtype):
    outputs, width, tokens = shape
    weight, rows, kept = weights(outputs, width, dtype=dtype), inputs(tokens, width), half_kept(shape[:2], share=share)
    same, updated = LeastSquares().solve(problem_of(weight, rows, kept=kept))
    H = damped(rows)
    best = direct(weight.double() @ H, H, kept)
    assert torch.equal(same, kept) and updated.dtype == dtype and (updated[~kept] == 0).all()
    assert error(weight, updated, H) <= error(weight, best, H) * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_little_is_lost_a_smaller_residual_gives_the_same(shape):
    """At 10 % sparsity the error is so small that the residual, measured by C, lets it be further from the least."""
    outputs, width, tokens = shape
    weight, H, kept = weights(outputs, width), damped(inputs(tokens, width)), half_kept(shape[:2], share=0.9)
    best = error(weight, direct(weight @ H, H, kept), H)
    assert error(weight, least_squares(weight, H, kept), H) <= best * (1 + 1e-3)
    assert error(weight, least_squares(weight, H, kept, tolerance=1e-6), H) <= best * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weights_are_those_of_a_direct_solve(shape):
    outputs, width, tokens = shape
    weight, H, kept = weights(outputs, width), damped(inputs(tokens, width)), half_kept(shape[:2])
    target = weights(outputs, width, seed=5) @ H
    for C in (None, target):
        updated = least_squares(weight, H, kept, C, tolerance=1e-8, steps=1000)
        best = direct(weight @ H if C is None else C, H, kept)
        torch.testing.assert_close(updated, best, rtol=1e-5, atol=1e-5)


def test_the_error_never_rises():
    weight, H, kept = weights(12, 96), damped(inputs(300, 96)), half_kept((12, 96))
    start = weights(12, 96, seed=7) * kept
    errors = [row_errors(weight, start, H)]
    for steps in range(1, 25):
        errors.append(row_errors(weight, least_squares(weight, H, kept, start=start, steps=steps), H))
    for before, after in zip(errors[:-1], errors[1:], strict=True):
        assert (after <= before * (1 + 1e-9)).all()
    assert (errors[1] < 0.9 * errors[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_row_without_a_pruned_weight_returns_as_it_is(dtype):
    weight, rows, kept = weights(6, 40, dtype=dtype), inputs(100, 40), half_kept((6, 40))
    kept[2] = True
    _, updated = LeastSquares().solve(problem_of(weight, rows, kept=kept))
    assert torch.equal(updated[2], weight[2]) and not torch.equal(updated[1], weight[1] * kept[1])
    everything = torch.ones_like(kept)
    _, updated = LeastSquares().solve(problem_of(weight, rows, kept=everything))
    assert torch.equal(updated, weight)


@pytest.mark.parametrize("target", [{"pattern": NM(2, 4)}, {"sparsity": "0.6"}], ids=str)
def test_it_is_never_above_sparsegpt_from_whose_weights_it_starts(target):
    weight, rows = weights(24, 256, dtype=torch.float32), inputs(600, 256)
    kept, swept = SparseGPT().solve(problem_of(weight, rows, scope="block", **target))
    layer, H = equations(problem_of(weight, rows)), damped(rows)
    updated = least_squares(weight, layer.matrix(layer.ridge(0.01)), kept, start=swept)
    assert (row_errors(weight, updated, H) <= row_errors(weight, swept, H) * (1 + 1e-6)).all()
    assert error(weight, updated, H) < 0.999 * error(weight, swept, H)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_the_weights_alone(dtype):
    weight, rows, kept = weights(8, 64, dtype=dtype), inputs(200, 64), half_kept((8, 64))
    _, updated = LeastSquares().solve(problem_of(weight, rows, kept=kept))
    _, exact = LeastSquares().solve(problem_of(weight.float(), rows, kept=kept))
    assert updated.dtype == dtype and torch.equal(updated, exact.to(dtype)) and (updated[~kept] == 0).all()


def test_dead_inputs_and_rows_without_a_weight():
    weight, rows, kept = weights(6, 32), inputs(20, 32), half_kept((6, 32))  # rank 20, at most
    rows[:, [3, 4, 17]] = 0
    kept[1] = False
    _, updated = LeastSquares().solve(problem_of(weight, rows, kept=kept))
    H = damped(rows)
    best = direct(weight @ H, H, kept)
    assert (updated[1] == 0).all()
    assert error(weight, updated, H) <= error(weight, best, H) * (1 + 1e-6)
    dead = kept[:, [3, 4, 17]]
    torch.testing.assert_close(updated[:, [3, 4, 17]], weight[:, [3, 4, 17]] * dead)  # nothing moves them
    _, updated = LeastSquares().solve(problem_of(weight, torch.zeros_like(rows), kept=kept))
    assert torch.equal(updated, weight * kept)


def test_a_row_that_has_stopped_stays_where_it_is():
    """Whatever the rows beside it need."""
    weight, H, kept = weights(9, 96), damped(inputs(300, 96)), half_kept((9, 96))
    start = weight * kept
    start[0] = direct(weight[:1] @ H, H, kept[:1])
    together = least_squares(weight, H, kept, start=start)
    assert torch.equal(together[0], start[0])
    for row in range(1, 9):
        alone = least_squares(weight[row : row + 1], H, kept[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-9, atol=1e-10)


def test_nothing_that_it_is_given_changes():
    weight, rows, kept = weights(6, 64), inputs(200, 64), half_kept((6, 64))
    problem = problem_of(weight, rows, kept=kept)
    H, target, start = damped(rows), weights(6, 64, seed=3), weights(6, 64, seed=4)
    given = (weight, problem.statistics["hessian"], kept, H, target, start)
    copies = [tensor.clone() for tensor in given]
    LeastSquares().solve(problem)
    least_squares(weight, H, kept, target, start)
    for now, copy in zip(given, copies, strict=True):
        assert torch.equal(now, copy)


def test_what_it_refuses():
    with pytest.raises(UserError, match="'layer'.*'lsq' needs a mask"):
        LeastSquares().solve(problem_of(weights(6, 8), inputs(20, 8), sparsity="0.5"))
    with pytest.raises(UserError, match="damp must be a number above 0"):
        LeastSquares(damp=0)
