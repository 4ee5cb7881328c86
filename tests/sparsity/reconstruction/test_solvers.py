"""The solvers that find a mask by themselves, ADMM and ALPS, against their formulas; and what holds for all solvers."""

import pytest
import torch

from sparsity.allocation.budget import budget
from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.admm import ADMM
from sparsity.reconstruction.alps import ALPS
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

FINDERS = {"sparsegpt": SparseGPT, "admm": ADMM, "alps": ALPS}
TARGETS = [
    {"sparsity": "0.5", "scope": "layer"},
    {"sparsity": "0.83", "scope": "row"},
    {"sparsity": "0.61", "scope": "block"},
    {"pattern": NM(2, 4)},
    {"pattern": NM(3, 16)},
]


def legal(kept, target):
    """Whether the counts are exactly those of the target."""
    if "pattern" in target:
        pattern = target["pattern"]
        return (kept.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    parts = {"layer": [kept], "row": kept.split(1), "block": kept.split(128, dim=1)}[target["scope"]]
    return all(int((~part).sum()) == budget(target["sparsity"], part.numel()) for part in parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "-".join(map(str, target.values())))
@pytest.mark.parametrize("name", FINDERS)
def test_counts_are_exact_and_nothing_changes(name, target, dtype):
    if name == "sparsegpt" and target.get("scope", "block") != "block":
        pytest.skip("it finds masks within blocks alone")
    weight, rows = weights(12, 192, dtype=dtype), inputs(300, 192)
    problem = problem_of(weight, rows, **target)
    copies = weight.clone(), problem.statistics["hessian"].clone()
    kept, updated = FINDERS[name]().solve(problem)
    assert kept.dtype == torch.bool and legal(kept, target)
    assert updated.dtype == dtype and (updated[~kept] == 0).all()
    assert torch.equal(weight, copies[0]) and torch.equal(problem.statistics["hessian"], copies[1])
    assert error(weight, updated, damped(rows)) < error(weight, weight * kept, damped(rows))


@pytest.mark.parametrize("solver", [SparseGPT, LeastSquares, ADMM, ALPS])
def test_a_given_mask_is_kept(solver):
    """With rows of no and of all weights, inputs that were always zero, and fewer tokens than inputs."""
    weight, rows, kept = weights(9, 64), inputs(40, 64), half_kept((9, 64))
    rows[:, [0, 5, 6]] = 0
    kept[1], kept[2] = False, True
    same, updated = solver().solve(problem_of(weight, rows, kept=kept))
    assert torch.equal(same, kept) and (updated[~kept] == 0).all() and updated.isfinite().all()
    live = torch.ones(64, dtype=torch.bool)
    live[[0, 5, 6]] = False
    torch.testing.assert_close(updated[2, live], weight[2, live], rtol=1e-6, atol=1e-6)
    H = damped(rows)
    assert error(weight[:, live], updated[:, live], H[live][:, live]) < error(weight, weight * kept, H)


def scaled(rows, damp=0.01):
    """Return ADMM's H in the layer's own units: G with (1 + damp) times its diagonal."""
    G = damped(rows, 0.0)
    diagonal = G.diagonal()
    return G + damp * torch.diag(torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)))


@pytest.mark.parametrize(
    ("shape", "rounds"), [((24, 128, 600), 20), ((40, 256, 2000), 20), ((40, 256, 300), 60), ((16, 96, 64), 500)]
)
def test_admm_converges_to_least_squares(shape, rounds):
    """In 20 rounds where there are enough tokens, later where G has hardly the rank."""
    outputs, width, tokens = shape
    weight, rows, kept = weights(outputs, width), inputs(tokens, width), half_kept((outputs, width))
    H = scaled(rows)
    _, updated = ADMM(rounds=rounds).solve(problem_of(weight, rows, kept=kept))
    best = error(weight, least_squares(weight, H, kept, tolerance=1e-8, steps=1000), H)
    assert best * (1 - 1e-9) <= error(weight, updated, H) <= 1.001 * best


def naive_admm(weight, rows, projection, damp=0.01):
    """The formula, with the mask of projection(values, t)."""
    G = damped(rows, 0.0)
    d = G.diagonal().sqrt()
    Gs, W, eye = G / torch.outer(d, d) + damp * torch.eye(len(d)), weight * d, torch.eye(len(d), dtype=d.dtype)
    U, V, M = torch.zeros_like(W), W, None
    for t in range(1, 21):
        M = projection((V + U).abs(), t) if t <= 15 else M
        Z = (V + U) * M
        U = U + V - Z
        V = (W @ Gs + Z - U) @ torch.linalg.inv(Gs + eye)
    return M, Z / d


def largest(values, count):
    """Return where the `count` largest are."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().argsort(descending=True)[:count]] = True
    return mask.view(values.shape)


def test_admm_finds_its_mask_by_the_rule():
    weight, rows = weights(10, 64), inputs(300, 64)

    def layer(values, t, s=0.7):
        return largest(values, 640 - int((s - s * (1 - t / 15) ** 3) * 640 + 1e-9))

    def row(values, t, s=0.7):
        pruned = int((s - s * (1 - t / 15) ** 3) * 64 + 1e-9)
        return torch.cat([largest(each, 64 - pruned) for each in values.split(1)])

    def group(values, t, s=0.5):
        always = NM(2, 4).keep(values)
        return largest(torch.where(always, values + 1e6, values), 640 - int((s - s * (1 - t / 15) ** 3) * 640 + 1e-9))

    for rule, target in (
        (layer, {"sparsity": "0.7", "scope": "layer"}),
        (row, {"sparsity": "0.7", "scope": "row"}),
        (group, {"pattern": NM(2, 4)}),
    ):
        kept, updated = ADMM().solve(problem_of(weight, rows, **target))
        expected, values = naive_admm(weight, rows, rule)
        assert torch.equal(kept, expected)
        torch.testing.assert_close(updated, values, rtol=1e-8, atol=1e-10)


def naive_alps(weight, rows, projection, damp=0.01):
    """The formula, by eigenvectors; the mask of the last D, and its least squares."""
    H = damped(rows, damp)
    d = H.diagonal().sqrt()
    values, Q = torch.linalg.eigh(H / torch.outer(d, d))
    W, C = weight * d, weight @ H / d
    support = projection(W.abs())
    D, Y, rho = W * support, torch.zeros_like(W), 0.1
    for t in range(1, 301):
        B = (C - Y + rho * D) @ Q @ torch.diag(1 / (values + rho)) @ Q.t()
        kept = projection((B + Y / rho).abs())
        D = (B + Y / rho) * kept
        Y = Y + rho * (B - D)
        if t % 3 == 0:
            changed = float((kept != support).sum() / kept.sum())
            if changed < 3e-4:
                break
            support, rho = kept, rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1)
    return kept, direct(weight @ H, H, kept)


@pytest.mark.parametrize("target", [{"sparsity": "0.7", "scope": "layer"}, {"pattern": NM(2, 4)}], ids=str)
def test_alps_finds_the_mask_of_the_formula(target):
    weight, rows = weights(10, 64), inputs(300, 64)
    kept, updated = ALPS().solve(problem_of(weight, rows, **target))
    expected, best = naive_alps(weight, rows, NM(2, 4).keep if "pattern" in target else lambda v: largest(v, 192))
    assert torch.equal(kept, expected)
    assert error(weight, updated, damped(rows)) <= error(weight, best, damped(rows)) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [{"pattern": NM(2, 4)}, {"sparsity": "0.7", "scope": "block"}], ids=str)
def test_alps_loses_less_than_sparsegpt(target, seed):
    weight, rows = weights(48, 128, seed, torch.float32), inputs(500, 128, seed)
    lost = {}
    for solver in (SparseGPT, ALPS):
        _, updated = solver().solve(problem_of(weight, rows, **target))
        lost[solver] = error(weight, updated, damped(rows))
    assert lost[ALPS] <= lost[SparseGPT]


def test_alps_of_a_given_mask_is_least_squares():
    weight, rows, kept = weights(8, 64), inputs(200, 64), half_kept((8, 64))
    problem = problem_of(weight, rows, kept=kept)
    assert torch.equal(ALPS().solve(problem)[1], LeastSquares().solve(problem)[1])


@pytest.mark.parametrize("solver", [ADMM, ALPS])
def test_a_layer_that_sees_nothing(solver):
    weight, rows = weights(6, 16), torch.zeros(20, 16, dtype=torch.float64)
    kept, updated = solver().solve(problem_of(weight, rows, sparsity="0.5", scope="layer"))
    assert int(kept.sum()) == 48
    torch.testing.assert_close(updated, weight * kept, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", [ADMM, ALPS])
def test_what_they_refuse(solver):
    weight, rows = weights(6, 8), inputs(20, 8)
    for options in ({}, {"sparsity": "0.5", "scope": "global"}):
        with pytest.raises(UserError, match="'layer'.*layer, row, block"):
            solver().solve(problem_of(weight, rows, **options))
    with pytest.raises(UserError, match="8 inputs does not divide into groups of 3"):
        solver().solve(problem_of(weight, rows, pattern=NM(1, 3)))
    with pytest.raises(UserError, match="damp must be"):
        solver(damp="more")
    for number in (0, 1.5):
        with pytest.raises(UserError, match="rounds must be"):
            solver(rounds=number)


def test_rows_lose_nothing_by_the_rows_beside_them():
    """Within rows, each is a problem of its own, but for when ALPS stops."""
    weight, rows = weights(5, 48), inputs(200, 48)
    _, together = ADMM().solve(problem_of(weight, rows, sparsity="0.5", scope="row"))
    for row in range(5):
        _, alone = ADMM().solve(problem_of(weight[row : row + 1], rows, sparsity="0.5", scope="row"))
        torch.testing.assert_close(together[row : row + 1], alone)
    assert (row_errors(weight, together, damped(rows)) > 0).all()
