"""Blocks of weights are pruned as one: every mask consists of whole blocks, and as many as the sparsity says."""

import logging
from fractions import Fraction

import pytest
import torch
from torch import nn

import pruners
from sparsity.errors import UserError
from sparsity.pattern import NM, Block, parse_pattern, pattern_of
from sparsity.reconstruction.sparsegpt import reconstruct, reconstruct_given
from sparsity.run.axes import ALLOCATIONS
from sparsity.run.request import Request
from sparsity.selection import lowered
from sparsity.statistics.hessian import factor
from sparsity.view import PrunableView
from tests.sparsity.reconstruction.problems import hessian_of, inputs, weights

BLOCK = Block(4, 2)
SHARE = Fraction(3, 5)


class Net(nn.Module):
    """Three layers that divide into blocks of 4 x 2, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 16), nn.Linear(16, 8)
        self.odd = nn.Linear(8, 3)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.odd(self.third(self.second(self.first(batch).relu()).relu()))


def made() -> PrunableView:
    model = Net().eval()
    return PrunableView(
        model,
        group_of=lambda name: "vision" if name.startswith("first") else "text",
        forward=model,
        loss=lambda batch, generator: model(batch).square().mean(),
        blocks=[model.first, model.second, model.third, model.odd],
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(2)]


def whole_blocks(mask: torch.Tensor, block: Block = BLOCK) -> torch.Tensor:
    """Return what is kept of each block, bool; fails where one is cut."""
    kept = torch.stack([m.reshape(-1) for b in mask.split(block.rows) for m in b.split(block.columns, 1)])
    assert torch.equal(kept.all(1), kept.any(1))
    return kept.all(1)


def pruned_blocks(masks) -> dict[str, int]:
    return {name: int((~whole_blocks(mask)).sum()) for name, mask in masks.items() if not name.startswith("odd")}


def total(view: PrunableView) -> int:
    return sum(weight.numel // BLOCK.numel for name, weight in view.weights.items() if not name.startswith("odd"))


@pytest.mark.parametrize(
    "pruner", [name for name in pruners.available() if not pruners.build(name).plan.reconstruction]
)
def test_every_score_prunes_whole_blocks_and_exactly_as_many(pruner: str) -> None:
    view = made()
    before = {name: weight.parameter.clone() for name, weight in view.weights.items()}
    scope = {"scope": "row"} if pruners.build(pruner).plan.scope == "block" else {}
    if pruners.build(pruner).plan.score.solver:
        scope |= {"reconstruct": "none", "calibration_mode": "dense"}
    masks = pruners.prune(view, pruner, sparsity=SHARE, pattern=BLOCK, data=batches(), allocation="global", **scope)
    found = pruned_blocks(masks)
    if scope.get("scope") != "row":
        assert sum(found.values()) == SHARE * total(view) // 1
    assert masks["odd.weight"].all() and masks.provenance["dense_layers"] == ["odd.weight"]
    assert masks.provenance["pattern"] == "block4x2" and 0 < sum(found.values()) < total(view)
    assert all(torch.equal(weight.parameter, before[name]) for name, weight in view.weights.items())


@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_every_allocation_prunes_whole_blocks(allocation: str, scope: str) -> None:
    view = made()
    how = {"allocation": allocation, "scope": scope}
    masks = pruners.prune(view, "wanda", sparsity=SHARE, pattern="block4x2", data=batches(), **how)
    found = pruned_blocks(masks)
    if allocation == "layer" and scope == "layer":
        assert found == {n: SHARE * view.weights[n].numel // BLOCK.numel for n in found}
    elif allocation != "layer":
        lost = SHARE * total(view) // 1
        assert lost - 1 <= sum(found.values()) <= lost  # every modality's share is rounded down where it competes alone


def test_scores_are_summed_over_the_block() -> None:
    view = made()
    masks = pruners.prune(view, "l2", sparsity=SHARE, pattern=BLOCK, allocation="layer", scope="layer")
    for name in ("first.weight", "third.weight"):
        weight = view.weights[name].matrix()
        sums = [part.abs().sum() for rows in weight.split(4) for part in rows.split(2, 1)]
        order = torch.stack(sums).argsort()
        pruned = order[: int(SHARE * len(order) // 1)]
        expected = torch.ones(len(order), dtype=torch.bool)
        expected[pruned] = False
        assert torch.equal(whole_blocks(masks[name]), expected)


@pytest.mark.parametrize("solver", ["lsq", "sparsegpt", "admm", "alps"])
def test_every_reconstruction_leaves_blocks_at_zero(solver: str) -> None:
    view = made()
    how = {"allocation": "layer", "scope": "layer", "reconstruct": solver}
    masks = pruners.prune(view, "wanda", sparsity=SHARE, pattern=BLOCK, data=batches(), **how)
    for name, mask in masks.items():
        assert not masks.weights[name][~mask].any()
    assert pruned_blocks(masks) == {n: SHARE * view.weights[n].numel // BLOCK.numel for n in pruned_blocks(masks)}


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm", "alps"])
def test_solvers_find_masks_of_blocks(pruner: str) -> None:
    view = made()
    masks = pruners.prune(view, pruner, sparsity=SHARE, pattern=BLOCK, data=batches(), reconstruct=pruner)
    assert pruned_blocks(masks) == {n: SHARE * view.weights[n].numel // BLOCK.numel for n in pruned_blocks(masks)}
    assert masks.weights["odd.weight"].equal(view.weights["odd.weight"].matrix())


@pytest.mark.parametrize("steps", [1, 2])
def test_solvers_prune_as_many_blocks_as_scores_say_where_layers_compete(steps: int) -> None:
    view = made()
    how = {"allocation": "global", "scope": "layer", "calibration_mode": "dense", "epochs": steps}
    masks = pruners.prune(view, "alps", sparsity=SHARE, pattern=BLOCK, data=batches(), **how)
    assert sum(pruned_blocks(masks).values()) == SHARE * total(view) // 1


def test_sparsegpt_takes_the_blocks_of_least_saliency_and_sweeps_as_with_a_given_mask() -> None:
    weight, rows = weights(8, 160), inputs(400, 160)
    found = factor(hessian_of(rows), 160, "layer", torch.float64)
    kept, updated = reconstruct(weight, found, "0.5", block=BLOCK)
    assert [int((~whole_blocks(part)).sum()) for part in kept.split(128, 1)] == [64, 16]
    assert torch.equal(updated, reconstruct_given(weight, found, kept))


def test_steps_keep_what_was_pruned_before() -> None:
    view = made()
    how = {"sparsity": SHARE, "pattern": BLOCK, "allocation": "layer", "scope": "layer"}
    in_steps = pruners.prune(view, "wanda", data=batches(), epochs=3, **how)
    assert pruned_blocks(in_steps) == pruned_blocks(pruners.prune(view, "wanda", data=batches(), **how))


def test_blocks_that_were_pruned_stay_the_lowest() -> None:
    alive = BLOCK.expand(torch.tensor([[True, False], [False, True]]))
    for dtype in (torch.float32, torch.float64):
        reduced = BLOCK.reduce(lowered(torch.randn(8, 4, dtype=dtype) - 1e6, alive))
        assert reduced.isfinite().all()
        assert reduced.flatten().argsort()[:2].sort().values.tolist() == [1, 2]


def test_reduce_and_expand_are_sums_and_copies() -> None:
    scores = torch.arange(32.0).view(8, 4)
    assert BLOCK.reduce(scores.bfloat16()).tolist() == [[52, 68], [180, 196]]
    assert BLOCK.expand(BLOCK.reduce(scores) > 100).sum() == 16


def test_patterns_are_parsed() -> None:
    assert pattern_of("block16x1") == Block(16, 1) and str(Block(16, 1)) == "block16x1"
    assert pattern_of("2:4") == NM(2, 4) and pattern_of(None) is pattern_of("unstructured") is None
    assert Request.of(["0.5"], Block(4, 4)) == Request(["0.5"], block=Block(4, 4))
    assert Request.of((), NM(2, 4)) == Request(pattern=NM(2, 4))
    for text in ("block", "block4", "block0x4", "block1x1", "block4x4x4", "4x4"):
        with pytest.raises(UserError, match="pattern"):
            pattern_of(text)
    with pytest.raises(UserError, match="blockRxC"):
        parse_pattern("block4x4")


def test_what_cannot_be_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    view = made()
    with pytest.raises(UserError, match="block64x64 divides no layer"):
        pruners.prune(view, "l2", sparsity=SHARE, pattern="block64x64")
    with pytest.raises(UserError, match="chita chooses single weights"):
        pruners.prune(view, "chita", sparsity=SHARE, pattern=BLOCK, data=batches())
    with pytest.raises(UserError, match="take --scope layer or row"):
        pruners.prune(view, "wanda", sparsity=SHARE, pattern=BLOCK, data=batches(), scope="block")
    with pytest.raises(UserError, match="at least one sparsity"):
        pruners.prune(view, "l2", sparsity=[], pattern=BLOCK)
    with caplog.at_level(logging.WARNING):
        pruners.prune(view, "l2", sparsity=SHARE, pattern=BLOCK)
    assert "1 layers stay dense, as block4x2 does not divide them: odd.weight" in caplog.text
