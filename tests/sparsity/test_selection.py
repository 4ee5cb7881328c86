"""Exactly the k lowest, whatever ties, however the scores are handed over."""

import pytest
import torch

from sparsity import selection
from sparsity.allocation.base import Part
from sparsity.allocation.budget import budget
from sparsity.run.axes import ALLOCATIONS, POOLS
from sparsity.run.select import budgets, select
from sparsity.selection import ascending, counts_by_name, keep, keep_exactly, keep_rows, thresholds
from tests.toys import layers, view_of

GENERATOR = torch.Generator().manual_seed(0)
DISTRIBUTIONS = {
    "normal": lambda shape: torch.randn(shape, generator=GENERATOR),
    "magnitudes": lambda shape: torch.randn(shape, generator=GENERATOR).abs(),
    "few values": lambda shape: torch.randint(-3, 3, shape, generator=GENERATOR) * 1.7,
    "all equal": lambda shape: torch.zeros(shape),
    "tiny": lambda shape: torch.randn(shape, generator=GENERATOR).abs() * 1e-42,
    "wide": lambda shape: 10.0 ** (torch.randn(shape, generator=GENERATOR) * 10),
    "mostly zeros of both signs": lambda shape: (
        -torch.rand(shape, generator=GENERATOR) * (torch.rand(shape, generator=GENERATOR) > 0.8)
    ),
}


def naive(scores: dict, count: int) -> torch.Tensor:
    """Kept weights by a stable sort of everything."""
    flat = torch.cat([score.flatten() for score in scores.values()]).double()
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[:count]] = False
    return kept


@pytest.mark.parametrize("few", [3, selection._FEW])  # 3: digit after digit, to the last
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_exactly_the_k_lowest_go(kind, dtype, few, monkeypatch):
    monkeypatch.setattr(selection, "_FEW", few)
    monkeypatch.setattr(selection, "_PIECE", 50)
    draw = DISTRIBUTIONS[kind]
    scores = {"a": draw((7, 9)).to(dtype), "b": draw((3, 50)).to(dtype).t(), "c": draw((11, 4)).to(dtype)}
    scores = {name: score.clamp(-6e4, 6e4) for name, score in scores.items()}
    total = sum(score.numel() for score in scores.values())
    counts = [0, 1, total // 2, 5, total - 1, total, 5]
    for source in (scores, lambda: iter(scores.items())):
        for count, threshold in zip(counts, thresholds(source, counts), strict=True):
            kept = dict(keep(source, threshold))
            assert torch.equal(torch.cat([kept[name].flatten() for name in scores]), naive(scores, count))


def test_agrees_with_kthvalue_on_a_larger_tensor():
    score = torch.rand(300, 1000, generator=GENERATOR)
    (threshold,) = thresholds({"a": score}, [123_456])
    assert threshold.value == score.flatten().kthvalue(123_456).values.item()


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("count", [0, 3])
def test_nan_and_inf_name_the_layer(bad, dtype, count):
    scores = {"good": torch.ones(2, 2, dtype=dtype), "bad": torch.ones(2, 2, dtype=dtype)}
    scores["bad"][1, 0] = bad
    with pytest.raises(ValueError, match="layer 'bad' hold NaN or Inf"):
        thresholds(scores, [count])
    with pytest.raises(ValueError, match="layer 'bad' hold NaN or Inf"):
        keep_rows("bad", scores["bad"], count=1)


def test_impossible_requests_are_errors():
    with pytest.raises(ValueError, match="cannot prune 5 of 4"):
        thresholds({"a": torch.rand(2, 2)}, [5])
    with pytest.raises(ValueError, match="no scores"):
        thresholds({}, [1])
    with pytest.raises(ValueError, match="one dtype"):
        thresholds({"a": torch.rand(2, 2), "b": torch.rand(2, 2).double()}, [1])
    with pytest.raises(ValueError, match="floating point"):
        thresholds({"a": torch.ones(2, 2, dtype=torch.int64)}, [1])


@pytest.mark.parametrize("levels", [3, 10_000])
@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_rows_lose_their_k_lowest(levels, count):
    score = torch.randint(0, levels, (20, 10), generator=GENERATOR).float()
    kept = keep_rows("a", score, count)
    for row, mask in zip(score, kept, strict=True):
        assert torch.equal(mask, naive({"row": row}, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ascending_is_a_stable_sort(dtype):
    values = torch.randint(-5, 5, (1000,), generator=GENERATOR).to(dtype)
    assert torch.equal(ascending(values), values.argsort(stable=True))


def selected(view, allocation, scope, sparsities, scores=None):
    """The masks of each sparsity, by magnitude."""

    def magnitudes(names):
        return ((name, view.weights[name].matrix().abs()) for name in names)

    whole = Part(view, list(view.weights), scores or magnitudes)
    parts = budgets(whole, sparsities, {})
    found = dict(select(parts, ALLOCATIONS.find(allocation)(), scope))
    return [{name: kept[i] for name, kept in found.items()} for i in range(len(sparsities))]


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_loses_its_budget(pool):
    view = view_of(layers((6, 300), (5, 3), (9, 4)), group_of=lambda name: "late" if name[0] == "c" else "early")
    sparsities = ["0.13", "0.57", "0.9"]
    sizes = {name: weight.numel for name, weight in view.weights.items()}
    masks = selected(view, *POOLS[pool], sparsities)
    for sparsity, kept in zip(sparsities, masks, strict=True):
        pruned = {name: mask.numel() - int(mask.sum()) for name, mask in kept.items()}
        if pool == "global":
            assert sum(pruned.values()) == budget(sparsity, view.numel)
        elif pool == "layer":
            assert pruned == {name: budget(sparsity, size) for name, size in sizes.items()}
        elif pool == "row":
            for name, mask in kept.items():
                assert set((~mask).sum(dim=1).tolist()) == {budget(sparsity, view.weights[name].shape[1])}
        elif pool == "block":
            for mask in kept.values():
                blocks = mask.split(128, dim=1)
                assert [int((~block).sum()) for block in blocks] == [budget(sparsity, b.numel()) for b in blocks]
        else:
            for names in view.groups.values():
                total = sum(sizes[name] for name in names)
                assert sum(pruned[name] for name in names) == budget(sparsity, total)
    for smaller, larger in zip(masks, masks[1:], strict=False):
        assert all((larger[name] <= smaller[name]).all() for name in view.weights)


def test_magnitude_counts_are_those_of_a_selection_over_the_group():
    view = view_of(layers((6, 7), (5, 3), (9, 4)), group_of=lambda name: "late" if name[0] == "c" else "early")
    (masks,) = selected(view, "magnitude", "layer", ["0.4"])
    counts = {name: mask.numel() - int(mask.sum()) for name, mask in masks.items()}
    magnitudes = {name: view.weights[name].matrix().abs() for name in view.groups["early"]}
    kept = naive(magnitudes, budget("0.4", 42 + 15))
    assert counts == {
        "a.weight": 42 - int(kept[:42].sum()),
        "b.weight": 15 - int(kept[42:].sum()),
        "c.weight": budget("0.4", 36),
    }


@pytest.mark.parametrize("allocation", ["global", "group", "magnitude"])
@pytest.mark.parametrize("scope", ["row", "block"])
def test_what_layers_lose_is_spread_evenly_over_rows_and_blocks(allocation, scope):
    """A layer loses as many as it does when its weights compete freely: rows lose equal numbers, the first one more."""
    view = view_of(layers((6, 300), (5, 3), (9, 4)), group_of=lambda name: "late" if name[0] == "c" else "early")
    free, even = (selected(view, allocation, each, ["0.13", "0.57"]) for each in ("layer", scope))
    for one, other in zip(free, even, strict=True):
        for name, mask in other.items():
            count = mask.numel() - int(mask.sum())
            assert count == one[name].numel() - int(one[name].sum())
            units = mask.split(128, dim=1) if scope == "block" else mask.unbind()
            lost = [int((~unit).sum()) for unit in units]
            exact = [count * unit.numel() / mask.numel() for unit in units]
            assert all(abs(found - share) < 1 for found, share in zip(lost, exact, strict=True))
            scores = view.weights[name].matrix().abs()
            for unit, loses, score in zip(
                units, lost, scores.split(128, dim=1) if scope == "block" else scores.unbind(), strict=True
            ):
                assert torch.equal(unit.flatten(), naive({name: score}, loses))


def test_counts_of_names_are_those_of_the_k_lowest_of_all():
    scores = {"a": torch.tensor([[1.0, 5.0], [2.0, 2.0]]), "b": torch.tensor([[2.0, 0.0, 9.0]])}
    assert counts_by_name(scores, [0, 3, 4, 7]) == [
        {"a": 0, "b": 0},
        {"a": 2, "b": 1},  # of the ties at 2 the first
        {"a": 3, "b": 1},
        {"a": 4, "b": 3},
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 20, 59, 60])
def test_an_exact_count_within_rows_goes_to_the_first(count):
    score = torch.randint(0, 4, (6, 10), generator=GENERATOR).float()
    kept = keep_exactly("a", score, "row", count)
    lost = (~kept).sum(dim=1).tolist()
    assert lost == [count // 6 + (row < count % 6) for row in range(6)]
    for row, mask, loses in zip(score, kept, lost, strict=True):
        assert torch.equal(mask, naive({"row": row}, loses))
