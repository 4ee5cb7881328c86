"""Exchanges within a row, against brute force over all pairs."""

import pytest
import torch

from sparsity.pattern import NM
from sparsity.solvers.swaps import swap
from tests.sparsity.reconstruction.problems import damped, half_kept, inputs, row_errors, weights


def brute(weight, H, kept, groups):
    """The least error of each row after one exchange, (out,), by trying all pairs within a group of so many columns."""
    best = row_errors(weight, weight * kept, H)
    for row in range(len(weight)):
        for p in range(weight.shape[1]):
            for q in range(weight.shape[1]):
                if kept[row, p] and not kept[row, q] and p // groups == q // groups:
                    mask = kept[row : row + 1].clone()
                    mask[0, p], mask[0, q] = False, True
                    tried = row_errors(weight[row : row + 1], weight[row : row + 1] * mask, H)
                    best[row] = min(best[row], tried[0])
    return best


@pytest.mark.parametrize("pattern", [None, NM(2, 4), NM(1, 2)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_one_round_is_the_best_exchange_of_each_row(seed, pattern):
    weight, H = weights(12, 8, seed), damped(inputs(40, 8, seed))
    kept = pattern.keep(weights(12, 8, seed + 50)) if pattern else half_kept((12, 8), seed)
    refined = swap(weight, H, kept, 1, pattern)
    found = row_errors(weight, weight * refined, H)
    torch.testing.assert_close(found, brute(weight, H, kept, pattern.m if pattern else 8), rtol=1e-9, atol=1e-12)
    assert (found < row_errors(weight, weight * kept, H)).any()


@pytest.mark.parametrize("width", [64, 160])
def test_what_is_left_out_could_not_be_the_best(width):
    """All pairs of a larger row, by the formula."""
    weight, H, kept = weights(20, width), damped(inputs(100, width)), half_kept((20, width), share=0.4)
    r = (weight * ~kept) @ H
    alone = weight.square() * H.diagonal()
    change = (alone + 2 * weight * r)[:, :, None] + (alone - 2 * weight * r)[:, None, :]
    change = change - 2 * weight[:, :, None] * weight[:, None, :] * H
    change = change.masked_fill(~(kept[:, :, None] & ~kept[:, None, :]), torch.inf).flatten(1).amin(dim=1)
    before = row_errors(weight, weight * kept, H)
    refined = swap(weight, H, kept, 1)
    torch.testing.assert_close(row_errors(weight, weight * refined, H), before + change.clamp(max=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_the_error_falls_and_the_counts_stay(pattern, dtype):
    weight, H = weights(16, 96, dtype=dtype), damped(inputs(200, 96))
    kept = pattern.keep(weight.abs()) if pattern else half_kept((16, 96))
    before = kept.clone()
    errors = [row_errors(weight, weight * kept, H)]
    for rounds in (1, 2, 3, 5, 10, 200):
        refined = swap(weight, H, kept, rounds, pattern)
        errors.append(row_errors(weight, weight * refined, H))
        assert torch.equal(refined.sum(dim=1), kept.sum(dim=1))
        if pattern:
            assert (refined.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    for earlier, later in zip(errors[:-1], errors[1:], strict=True):
        assert (later <= earlier * (1 + 1e-5)).all()
    assert errors[-1].sum() < 0.8 * errors[0].sum()
    assert torch.equal(kept, before)
    assert torch.equal(swap(weight, H, refined, 5, pattern), refined)  # nothing is left to gain


def test_rows_with_nothing_to_exchange():
    weight, H = weights(4, 16), damped(inputs(40, 16))
    kept = half_kept((4, 16))
    kept[0], kept[1] = True, False
    for pattern in (None, NM(2, 4)):
        assert torch.equal(swap(weight, H, kept, 5, pattern)[:2], kept[:2])
    assert torch.equal(swap(weight, torch.zeros(16, 16), kept, 5), kept)
