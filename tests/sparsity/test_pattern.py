"""N:M masks: N kept in every M, always."""

from fractions import Fraction

import pytest
import torch

from sparsity.pattern import NM, parse_pattern

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "4:8", "8:16", "2:3"]


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("levels", [2, 1000])
def test_exactly_n_of_every_m_are_kept_and_they_are_the_highest(text, levels):
    pattern = parse_pattern(text)
    scores = torch.randint(0, levels, (5, 6 * pattern.m), generator=torch.Generator().manual_seed(0)).float()
    kept = pattern.keep(scores)
    assert kept.shape == scores.shape and kept.dtype == torch.bool
    for row in range(5):
        for start in range(0, scores.shape[1], pattern.m):
            group = scores[row, start : start + pattern.m].tolist()
            pruned = sorted(range(pattern.m), key=lambda i: (group[i], i))[: pattern.m - pattern.n]
            expected = [i not in pruned for i in range(pattern.m)]
            assert kept[row, start : start + pattern.m].tolist() == expected


def test_of_equal_scores_the_lowest_index_goes_first():
    assert parse_pattern("2:4").keep(torch.zeros(1, 4)).tolist() == [[False, False, True, True]]


def test_parsing():
    assert parse_pattern("2:4") == NM(2, 4) and str(NM(2, 4)) == "2:4"
    assert parse_pattern("1:4").sparsity == Fraction(3, 4)
    assert parse_pattern(None) is parse_pattern("unstructured") is None


@pytest.mark.parametrize("text", ["4:4", "0:4", "4:2", "2-4", "2:4:8", "", "a:b", "-1:4"])
def test_a_bad_pattern_is_one_clear_line(text):
    with pytest.raises(ValueError, match="pattern must be N:M"):
        parse_pattern(text)


def test_a_layer_that_does_not_divide_is_not_cut():
    assert NM(2, 4).fits(8) and not NM(2, 4).fits(6)
    with pytest.raises(ValueError, match="does not divide"):
        NM(2, 4).keep(torch.zeros(3, 6))
