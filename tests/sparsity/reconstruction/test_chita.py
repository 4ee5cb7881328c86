"""CHITA's solver: the published answer, dense formulas, exactly k, no block lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsity.pattern import NM
from sparsity.solvers import blockwise
from sparsity.solvers.blockwise import cut, objective, solve
from sparsity.statistics.gradient_rows import Rows

KNOWN = Path("tests/data/chita")  # the published solve, its rows in bfloat16 and its weights in float16


def rows_of(A, batch_size=2):
    return Rows(A, range(len(A)), len(A), len(A) * batch_size)


def problem(n=5, shapes=((12, 10), (9, 14)), seed=0, scale=0.1, size=0.2):
    """Rows and weights, normally distributed; steps along the gradient are long enough to exchange weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = {str(i): size * torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    width = sum(weight.numel() for weight in weights.values())
    return rows_of(scale * torch.randn(n, width, generator=generator)), weights


def solved(rows, weights, count, ridge=1e-2, **options):
    """(which weights are kept, what they become), flat, and side by side."""
    found = list(solve(rows, weights, count, ridge=ridge, **options))
    assert [name for name, _, _ in found] == list(weights)
    assert all(kept.shape == new.shape == weights[name].shape for name, kept, new in found)
    kept, new = (torch.cat([item[i].flatten() for item in found]) for i in (1, 2))
    return kept.numpy(), new.double().numpy()


def flat(weights):
    return torch.cat([weight.flatten() for weight in weights.values()]).double().numpy()


def blocks_of(weights, size):
    bounds, first = {}, 0
    for name, weight in weights.items():
        bounds[name], first = cut(weight.numel(), size), first + weight.numel()
    return bounds


def spans(weights, blocks):
    """(begin, end) of all blocks, in all columns."""
    first = 0
    for name, weight in weights.items():
        yield from ((first + a, first + b) for a, b in zip(blocks[name], blocks[name][1:], strict=False))
        first += weight.numel()


# The naive way: p x p matrices in float64, nothing streamed


def top(values, count):
    kept = np.zeros(len(values), bool)
    kept[np.argsort(-np.abs(values), kind="stable")[:count]] = True
    return kept


def q(A, a, w0, w, mu):
    hessian = A.T @ A + mu * np.eye(len(w0))
    return (w - w0) @ hessian @ (w - w0) / 2 + a @ w


def naive_step(A, a, w0, start, count, mu, alive):
    """A projected-gradient step with line search; where it ends, the weights that it keeps, whether it searched."""
    slope = (A.T @ A + mu * np.eye(len(w0))) @ (start - w0) + a
    slope[~alive] = 0
    inside = top(np.where(alive, start, 0), count) & alive
    part = np.where(inside, slope, 0)
    bend = part @ A.T @ A @ part + mu * part @ part
    step = part @ part / bend if bend else 0.0

    def stays(step):
        moved = np.abs(start - step * slope)
        others = moved[~inside & alive]
        return not len(others) or not inside.any() or moved[inside].max() >= others.max() - 1e-10

    if stays(step):
        return np.where(inside, start - step * slope, 0), inside, False
    step /= 2
    while not stays(step):
        step /= 2
    best, kept = np.where(inside, start, 0), inside
    for _ in range(10):
        moved = start - step * slope
        chosen = top(moved, count)
        trial = np.where(chosen, moved, 0)
        if q(A, a, w0, trial, mu) >= q(A, a, w0, best, mu):
            break
        best, kept, step = trial, chosen, 2 * step
    return best, kept, True


def naive(rows, weights, count, ridge, blocks, alive=None):
    """(kept, weights, how many blocks were searched)."""
    A, w0 = rows.read(0, rows.width).double().numpy(), flat(weights)
    a, mu = A.sum(0) / rows.batch_size, rows.n * ridge
    alive = np.ones(len(w0), bool) if alive is None else alive
    start, kept, _ = naive_step(A, a, w0, w0, count, mu, alive)
    new, searched = np.zeros_like(w0), 0
    for begin, end in spans(weights, blocks):
        i = slice(begin, end)
        number = int(kept[i].sum())
        _, kept[i], search = naive_step(A[:, i], a[i], w0[i], start[i], number, mu, alive[i])
        searched += search
        inside = np.arange(begin, end)[kept[i]]
        X = A[:, inside]
        right = X.T @ (A[:, i] @ w0[i]) + mu * w0[inside] - a[inside]
        new[inside] = np.linalg.solve(X.T @ X + mu * np.eye(number), right)
    return kept, new, searched


@pytest.mark.parametrize("count", [30, 60, 200, 246])
@pytest.mark.parametrize("n", [1, 5, 40])  # 40 rows: more than some blocks keep
@pytest.mark.parametrize("seed", [0, 1])
def test_the_formulas_written_out(n, count, seed):
    rows, weights = problem(n, seed=seed)
    blocks = blocks_of(weights, 50)
    kept, new = solved(rows, weights, count, blocks=blocks)
    expected, weights_expected, searched = naive(rows, weights, count, 1e-2, blocks)
    assert searched or count > 30
    assert (kept == expected).all()
    np.testing.assert_allclose(new, weights_expected, rtol=1e-4, atol=1e-5)


def test_the_search_over_the_whole_problem(monkeypatch):
    """Gradients so flat that the best step would exchange weights already there."""
    rows, weights = problem(scale=0.03, size=0.1)
    blocks, values = blocks_of(weights, 50), []
    value = blockwise._Problem.value
    monkeypatch.setattr(blockwise._Problem, "value", lambda *given: values.append(value(*given)) or values[-1])
    kept, new = solved(rows, weights, 90, blocks=blocks)
    expected, weights_expected, _ = naive(rows, weights, 90, 1e-2, blocks)
    assert len(values) > 2 and values[1] < values[0] and (kept != top(flat(weights), 90)).any()
    assert (kept == expected).all()
    np.testing.assert_allclose(new, weights_expected, rtol=1e-4, atol=1e-5)


def test_what_was_pruned_stays_pruned():
    rows, weights = problem()
    generator = torch.Generator().manual_seed(3)
    alive = {name: torch.rand(w.shape, generator=generator) < 0.6 for name, w in weights.items()}
    weights = {name: weight * alive[name] for name, weight in weights.items()}
    blocks, living = blocks_of(weights, 50), flat(alive).astype(bool)
    for count in (40, 100, living.sum()):
        kept, new = solved(rows, weights, int(count), alive=alive, blocks=blocks)
        expected, weights_expected, searched = naive(rows, weights, count, 1e-2, blocks, living)
        assert searched or count > 40
        assert (kept == expected).all() and kept.sum() == count and not (kept & ~living).any()
        np.testing.assert_allclose(new, weights_expected, rtol=1e-4, atol=1e-5)


# The published answer


def test_the_published_solve():
    """The mask differs in at most 0.5 % of the bits, the objective is not worse by more than 1e-4, k are kept."""
    data, facts = np.load(KNOWN / "solver.npz"), json.loads((KNOWN / "solver.json").read_text())
    A, w = (torch.from_numpy(np.moveaxis(data[key], 0, -1).copy()) for key in ("A_bytes", "w"))
    rows = rows_of(A.view(torch.bfloat16).squeeze(-1).float(), facts["batch_size"])
    weights = {"all": w.view(torch.float16).squeeze(-1).float()[None]}
    blocks = {"all": data["blocks"].tolist()}
    ((_, kept, new),) = solve(rows, weights, facts["k"], ridge=facts["ridge"], blocks=blocks)
    published = np.unpackbits(data["mask"], count=kept.numel(), bitorder="little").astype(bool)
    assert kept.sum() == facts["k"] == (new != 0).sum()
    assert (kept.numpy()[0] != published).mean() <= 0.005
    assert (top(flat(weights), facts["k"]) != published).mean() > 0.02, "magnitudes alone would not do"
    assert objective(rows, weights, {"all": new}, facts["ridge"]) <= facts["objective"] * (1 + 1e-4)


# Properties


def test_the_objective_is_the_formula():
    rows, weights = problem()
    after = {name: weight * 0.5 for name, weight in weights.items()}
    A, w0, w = rows.read(0, rows.width).double().numpy(), flat(weights), flat(after)
    error = A @ w0 - A @ w
    expected = error @ error / 2 + A.sum(0) / 2 @ w + 5 * 0.3 / 2 * (w - w0) @ (w - w0)
    assert objective(rows, weights, after, 0.3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 17, 128, 246])
@pytest.mark.parametrize("kind", ["equal", "zero", "few values"])
def test_exactly_k_are_kept_also_when_all_tie(count, kind):
    rows, weights = problem()
    for weight in weights.values():
        weight.copy_({"equal": torch.ones_like(weight), "zero": 0 * weight}.get(kind, weight.round()))
    for part in (rows, rows_of(torch.zeros(5, rows.width)), rows_of(torch.ones(5, rows.width))):
        kept, new = solved(part, weights, count, blocks=blocks_of(weights, 50))
        assert kept.sum() == count and not new[~kept].any() and np.isfinite(new).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_lost_and_none_gets_worse(scale, seed):
    """Each block keeps as many as it was given, and is no worse than where its search began."""
    rows, weights = problem(4, seed=seed, scale=scale)
    blocks, mu = blocks_of(weights, 40), 4 * 1e-2
    whole = blockwise._Problem(rows, weights, 1e-2, None)
    step, given = blockwise._choose(whole, 80)
    begun = torch.cat([whole.moved(piece, step) * piece.of(given) for piece in whole.pieces()]).double().numpy()
    given = flat(given)
    kept, new = solved(rows, weights, 80, blocks=blocks)
    A, w0 = rows.read(0, rows.width).double().numpy(), flat(weights)
    a = A.sum(0) / rows.batch_size
    for begin, end in spans(weights, blocks):
        i = slice(begin, end)
        assert kept[i].sum() == given[i].sum()
        value = q(A[:, i], a[i], w0[i], new[i], mu)
        assert value <= q(A[:, i], a[i], w0[i], begun[i], mu) + 1e-4 * max(1, abs(value))


def test_how_many_blocks_are_solved_together_changes_nothing(monkeypatch):
    rows, weights = problem()
    blocks = blocks_of(weights, 20)
    found = []
    for piece in (1, 500, 10**6):
        monkeypatch.setattr("sparsity.statistics.gradient_rows._PIECE", {"cpu": piece})
        monkeypatch.setattr("sparsity.solvers.blockwise._PIECE", {"cpu": piece})
        found.append(solved(rows, weights, 100, blocks=blocks))
    for kept, new in found[1:]:
        assert (kept == found[0][0]).all()
        np.testing.assert_allclose(new, found[0][1], rtol=1e-4, atol=1e-4)


def test_threads_change_nothing():
    rows, weights = problem(shapes=((40, 50), (9, 14)))
    blocks = blocks_of(weights, 20)
    alone = solved(rows, weights, 300, blocks=blocks)
    torch.set_num_threads(3)
    together = solved(rows, weights, 300, blocks=blocks)
    assert torch.get_num_threads() == 3
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 5)])
def test_a_pattern_takes_the_place_of_the_count(pattern):
    rows, weights = problem(4, shapes=((6, 20), (5, 7), (4, 40)), scale=0.03, size=0.1)
    dense = {name for name, weight in weights.items() if not pattern.fits(weight.shape[1])}
    exchanged = 0
    for name, kept, new in solve(rows, weights, None, ridge=1e-2, pattern=pattern):
        if name in dense:
            assert kept.all() and torch.equal(new, weights[name])
        else:
            assert (kept.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all() and not new[~kept].any()
            exchanged += int((kept != pattern.keep(weights[name].abs())).sum())
    assert dense and exchanged


@pytest.mark.parametrize(("numel", "size", "unit"), [(1, 10, 1), (10, 10, 1), (11, 10, 1), (1000, 33, 1), (96, 30, 4)])
def test_blocks_are_even_and_none_is_too_large(numel, size, unit):
    bounds = cut(numel, size, unit)
    lengths = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == numel and lengths.max() <= size and not (lengths % unit).any()
    assert lengths.max() - lengths.min() <= unit and len(lengths) == -(-numel // (size // unit * unit))


def test_weights_of_half_precision_come_back_as_such():
    rows, weights = problem()
    halves = {name: weight.bfloat16() for name, weight in weights.items()}
    for name, _, new in solve(rows, halves, 100, ridge=1e-2):
        assert new.dtype == torch.bfloat16 and halves[name].dtype == torch.bfloat16
