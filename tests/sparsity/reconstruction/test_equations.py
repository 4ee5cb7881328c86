"""The dense model's output as the target, the bias, and damping that is chosen, on calibration data written out."""

from dataclasses import replace

import pytest
import torch

from sparsity.errors import UserError
from sparsity.reconstruction.admm import ADMM
from sparsity.reconstruction.alps import ALPS
from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.bias import bias_change, centred
from sparsity.reconstruction.damping import CHOICES, choose_damp, damping
from sparsity.reconstruction.equations import equations, relative_error, symmetric
from sparsity.reconstruction.lsq import LeastSquares
from sparsity.reconstruction.sparsegpt import SparseGPT
from sparsity.solvers.conjugate import least_squares
from sparsity.statistics.hessian import gram
from tests.sparsity.reconstruction.problems import (
    damped,
    direct,
    error,
    half_kept,
    hessian_of,
    inputs,
    problem_of,
    weights,
)

SOLVERS = [LeastSquares, ADMM, ALPS]


def streams(tokens=600, width=64):
    """Return the inputs of the dense model, and those of a pruned one, which differ, and have another mean."""
    dense = inputs(tokens, width)
    mix = torch.eye(width) + 0.2 * weights(width, width, 9) / width**0.5
    return dense, dense @ mix + 0.1 * weights(1, width, 8)


def both(weight, dense, pruned, a, **options):
    """Return the problem of a layer whose target is the dense model's output."""
    statistics = {
        "hessian": hessian_of(pruned),
        "dense_hessian": hessian_of(dense),
        "cross": dense.t() @ pruned / len(dense),
        "input_means": pruned.mean(0),
        "dense_means": dense.mean(0),
    }
    return Problem("layer", weight, statistics, dense_share=a, **options)


def test_strips_become_the_whole_matrix():
    for width in (5, 130, 300):
        rows = inputs(40, width)
        torch.testing.assert_close(symmetric(gram(rows), width), rows.t() @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_both_sides_of_the_equations(a):
    dense, pruned = streams()
    weight = weights(6, 64)
    layer = equations(both(weight, dense, pruned, a))
    n, lam = len(dense), layer.ridge(0.01)
    C = a * weight @ dense.t() @ pruned / n + (1 - a) * weight @ pruned.t() @ pruned / n + lam * weight
    torch.testing.assert_close(layer.right(lam), C)
    torch.testing.assert_close(layer.matrix(lam), damped(pruned))
    assert layer.same == (a == 0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("a", [0.5, 1.0])
def test_the_dense_output_is_come_closer_to(solver, a):
    dense, pruned = streams()
    weight, kept = weights(12, 64), half_kept((12, 64))
    problem = both(weight, dense, pruned, a, kept=kept)
    _, same = solver().solve(replace(problem, dense_share=0.0))
    _, updated = solver().solve(problem)

    def distance(B):
        return float((weight @ (a * dense + (1 - a) * pruned).t() - B @ pruned.t()).square().sum())

    assert distance(updated) < 0.98 * distance(same)
    if solver is not ADMM:
        C, H = equations(problem).right(equations(problem).ridge(0.01)), damped(pruned)
        torch.testing.assert_close(updated, direct(C, H, kept), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_where_the_inputs_agree_both_targets_are_one(solver):
    rows, weight, kept = inputs(300, 64), weights(8, 64), half_kept((8, 64))
    for options in ({"kept": kept}, {} if solver is LeastSquares else {"sparsity": "0.5", "scope": "row"}):
        if options:
            _, same = solver().solve(both(weight, rows, rows, 0.0, **options))
            _, updated = solver().solve(both(weight, rows, rows, 0.7, **options))
            torch.testing.assert_close(updated, same, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", [ADMM, ALPS])
def test_a_mask_is_found_for_the_dense_output(solver):
    dense, pruned = streams()
    kept, updated = solver().solve(both(weights(12, 64), dense, pruned, 1.0, sparsity="0.6", scope="row"))
    assert (kept.sum(dim=1) == 64 - 38).all() and (updated[~kept] == 0).all()
    same, _ = solver().solve(both(weights(12, 64), dense, pruned, 0.0, sparsity="0.6", scope="row"))
    assert not torch.equal(kept, same)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_the_relative_error_is_that_of_the_output(a):
    dense, pruned = streams()
    weight, updated = weights(6, 64), weights(6, 64) * half_kept((6, 64))
    wanted, n = weight @ (a * dense + (1 - a) * pruned).t(), len(dense)
    ridge = damped(pruned)[0, 0] - damped(pruned, 0.0)[0, 0]
    lost = (wanted - updated @ pruned.t()).square().sum() / n + ridge * (weight - updated).square().sum()
    size = wanted.square().sum() / n + ridge * weight.square().sum()
    found = relative_error(both(weight, dense, pruned, a), updated, 0.01)
    assert found == pytest.approx(float(lost / size), rel=1e-9)
    assert relative_error(both(weight, dense, pruned, 0.0), weight, 0.01) == 0


def test_what_the_dense_target_needs():
    problem = problem_of(weights(6, 8), inputs(20, 8), kept=half_kept((6, 8)), dense_share=1.0)
    for solver in SOLVERS:
        with pytest.raises(UserError, match="'layer': --target dense needs"):
            solver().solve(problem)
    with pytest.raises(UserError, match="target"):
        SparseGPT().solve(problem)


@pytest.mark.parametrize("solver", [SparseGPT, *SOLVERS])
@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_a_corrected_bias_keeps_the_mean_output(solver, a):
    if solver is SparseGPT and a:
        pytest.skip("it has one target")
    dense, pruned = streams()
    dense, pruned = (dense, pruned) if a else (pruned, pruned)
    weight, bias, kept = weights(12, 64), weights(1, 12, 3)[0], half_kept((12, 64), share=0.3)
    problem = both(weight, dense, pruned, a, kept=kept)
    problem = replace(problem, statistics=centred(problem.statistics))
    _, updated = solver().solve(problem)
    changed = bias + bias_change(weight, updated, pruned.mean(0), dense.mean(0))
    before, after = dense @ weight.t() + bias, pruned @ updated.t() + changed
    assert ((after.mean(0) - before.mean(0)).abs() <= 1e-5 * before.std(0)).all()


def test_statistics_of_centred_inputs():
    dense, pruned = streams(200, 150)
    pruned[:, 7], pruned[:, 8] = 3.0, 0.0  # constant, and always zero
    before = both(weights(2, 150), dense, pruned, 1.0).statistics
    copies = {name: value.clone() for name, value in before.items()}
    found = centred(before)
    X, Xh = dense - dense.mean(0), pruned - pruned.mean(0)
    Xh[:, 7] = 0
    torch.testing.assert_close(symmetric(found["hessian"], 150), 2 / 200 * Xh.t() @ Xh)
    torch.testing.assert_close(symmetric(found["dense_hessian"], 150), 2 / 200 * X.t() @ X)
    torch.testing.assert_close(found["cross"], X.t() @ Xh / 200)
    assert (symmetric(found["hessian"], 150)[[7, 8]] == 0).all()
    assert all(torch.equal(before[name], copies[name]) for name in before)


def test_least_squares_of_centred_inputs_lose_less_than_a_bias_afterwards():
    rows, weight, kept = inputs(400, 64) + 1.0, weights(12, 64), half_kept((12, 64), share=0.3)
    problem = both(weight, rows, rows, 0.0, kept=kept)
    lost = []
    for one in (problem, replace(problem, statistics=centred(problem.statistics))):
        _, updated = LeastSquares().solve(one)
        change = bias_change(weight, updated, rows.mean(0))
        lost.append(float((rows @ (weight - updated).t() - change).square().sum()))
    assert lost[1] < 0.99 * lost[0]


def held_out(weight, tokens, kept=None, noise=0.0, **options):
    """Return a problem with samples that are held out, its inputs and theirs."""
    rows, others = inputs(tokens + 2000, weight.shape[1]).split([tokens, 2000])
    others = others + noise * weights(2000, weight.shape[1], 6)
    statistics = {"hessian": hessian_of(rows), "training": hessian_of(rows), "held_out": hessian_of(others)}
    return Problem("layer", weight, statistics, kept=kept, **options), rows, others


@pytest.mark.parametrize(("tokens", "noise"), [(3000, 0.0), (70, 0.0), (40, 1.0)])
def test_the_damping_is_the_best_on_held_out_samples(tokens, noise):
    weight = weights(300, 48)  # of which 256 rows are solved
    kept = half_kept((300, 48), share=0.4)
    problem, rows, others = held_out(weight, tokens, kept, noise)
    chosen = torch.linspace(0, 299, 256).round().long()
    errors = {}
    for damp in CHOICES:
        B = least_squares(weight[chosen], damped(rows, damp), kept[chosen])
        errors[damp] = error(weight[chosen], B, damped(others, 0.0))
    assert choose_damp(problem) == min(errors, key=errors.__getitem__)


def test_few_samples_want_more_damping():
    weight = weights(20, 48)
    found = [choose_damp(held_out(weight, tokens, sparsity="0.6", scope="row")[0]) for tokens in (4000, 30)]
    assert found[0] < found[1]


@pytest.mark.parametrize("solver", [SparseGPT, *SOLVERS])
def test_auto_is_one_solve_with_what_it_chose(solver):
    weight = weights(8, 48)
    problem, *_ = held_out(weight, 60, half_kept((8, 48)))
    chosen = choose_damp(problem)
    assert damping("auto", problem) == chosen and damping(0.3, problem) == 0.3
    _, updated = solver(damp="auto").solve(problem)
    assert torch.equal(updated, solver(damp=chosen).solve(problem)[1])
    with pytest.raises(UserError, match="'layer'.*held out"):
        solver(damp="auto").solve(problem_of(weight, inputs(60, 48), kept=half_kept((8, 48))))
