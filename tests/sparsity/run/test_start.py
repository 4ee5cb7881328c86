"""Runs that begin with a mask that is there: its zeros stay and count."""

import pytest
import torch

import pruners
from sparsity.allocation.budget import budget
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from tests.sparsity.run.test_engine import SPARSITY, Net, batches_of, lost, view_of

PATTERN = NM(2, 4)


@pytest.fixture
def view():
    return view_of(Net().eval())


@pytest.fixture
def start(view):
    """40 % pruned over the whole model, so that rows and blocks have lost unequal shares."""
    return pruners.prune(view, "omp", sparsity="0.4")


@pytest.mark.parametrize("scope", ["layer", "row", "block"])
@pytest.mark.parametrize("allocation", ["error", "owl", "layer", "magnitude", {"vision": 0.4}])
def test_zeros_stay_and_count(view, start, scope, allocation):
    for score, reconstruct in (("wanda", "none"), ("snip", "lsq"), ("sparsegpt", "sparsegpt")):
        options = {"scope": scope, "allocation": allocation, "reconstruct": reconstruct, "data": batches_of()}
        masks = pruners.prune(view, score, sparsity=SPARSITY, start=start, **options)
        assert not any((mask & ~start[name]).any() for name, mask in masks.items())
        if allocation not in ("layer", "magnitude"):  # these round for each unit, and each modality
            assert lost(masks) == budget(SPARSITY, view.numel)
        assert masks.provenance["from_mask"] == start.digest()
        for name, weight in masks.weights.items():
            assert not weight[~masks[name]].any()


def test_a_plan_from_its_own_mask_gives_what_it_gives_of_the_dense_model(view):
    """Without data the order of the scores stays, so that a nested mask is the same."""
    start = pruners.prune(view, "omp", sparsity="0.4")
    assert pruners.prune(view, "omp", sparsity=SPARSITY, start=start).digest() == (
        pruners.prune(view, "omp", sparsity=SPARSITY).digest()
    )


def test_it_scores_the_pruned_model_and_leaves_the_dense_one(view, start):
    before = {key: tensor.clone() for key, tensor in view.model.state_dict().items()}
    options = {"sparsity": SPARSITY, "allocation": "global", "scope": "layer", "data": batches_of()}
    masks = pruners.prune(view, "wanda", start=start, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in view.model.state_dict().items())
    start.apply(view)
    assert masks.digest() == pruners.prune(view, "wanda", **options).digest()


@pytest.mark.parametrize("steps", [1, 3])
def test_updated_weights_are_carried_on(view, steps):
    start = pruners.prune(view, "wanda", sparsity="0.4", reconstruct="lsq", data=batches_of())
    masks = pruners.prune(view, "wanda", sparsity=SPARSITY, start=start, data=batches_of(), epochs=steps)
    for name in view.weights:
        assert torch.equal(masks.weights[name], start.weights[name] * masks[name])
    bare = Masks(dict(start.items()), aliases=view.aliases)
    assert not pruners.prune(view, "wanda", sparsity=SPARSITY, start=bare, data=batches_of()).weights


def test_each_step_sees_the_updated_weights_and_biases(view):
    """As if they were the model's own."""
    updates = {"reconstruct": "lsq", "correct_bias": True, "data": batches_of()}
    start = pruners.prune(view, "wanda", sparsity="0.4", **updates)
    assert start.biases
    for options in ({}, {"reconstruct": "lsq"}, {"reconstruct": "lsq", "correct_bias": True}):
        options |= {"sparsity": SPARSITY, "epochs": 2, "schedule": "linear", "scope": "layer", "data": batches_of()}
        found = pruners.prune(view, "wanda", start=start, **options)
        other = view_of(Net().eval())
        start.apply(other)
        expected = pruners.prune(other, "wanda", start=Masks(dict(start.items())), **options)
        assert found.digest() == expected.digest()
        found.apply(view := view_of(Net().eval()))
        expected.apply(other)
        for key, tensor in view.model.state_dict().items():
            torch.testing.assert_close(tensor, other.model.state_dict()[key])


def test_a_pattern_is_completed_or_its_short_groups_are_counted(view, start):
    loose = pruners.prune(view, "omp", pattern="3:4")
    for score, options in (("omp", {}), ("wanda", {"reconstruct": "lsq", "data": batches_of()})):
        masks = pruners.prune(view, score, pattern=PATTERN, start=loose, **options)
        for name, mask in masks.items():
            assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and not (mask & ~loose[name]).any()
    groups = [mask.unflatten(1, (-1, 4)).sum(-1) for mask in start.values()]
    short, total = sum(int((left < 2).sum()) for left in groups), sum(left.numel() for left in groups)
    with pytest.raises(UserError, match=rf"{short} of {total} groups of 4 have fewer than 2 weights left"):
        pruners.prune(view, "omp", pattern=PATTERN, start=start)


def test_layers_that_a_pattern_does_not_fit_keep_their_zeros():
    view = view_of(Net(width=130).eval())  # 4 does not divide the inputs of the last
    start = Masks({name: torch.ones_like(w.parameter, dtype=torch.bool) for name, w in view.weights.items()})
    kept = {name: mask.clone() for name, mask in start.items()}
    kept["down.weight"][:, :7] = False
    for options in ({}, {"reconstruct": "lsq", "data": batches_of()}):
        masks = pruners.prune(view, "wanda" if options else "omp", pattern=PATTERN, start=Masks(kept), **options)
        assert torch.equal(masks["down.weight"], kept["down.weight"])
        assert not masks.weights or not masks.weights["down.weight"][:, :7].any()


def test_what_cannot_be_is_refused_in_one_line(view, start):
    share = 100 * lost(start) / view.numel
    with pytest.raises(UserError, match=rf"\({share:.4g} %\), more than 30 %: ask for a higher sparsity"):
        pruners.prune(view, "omp", sparsity="0.3", start=start)
    with pytest.raises(UserError, match="of vision are pruned already"):
        pruners.prune(view, "omp", sparsity="0.5", group_sparsity={"vision": "0.01"}, start=start)
    with pytest.raises(UserError, match="the masks do not fit"):
        pruners.prune(view, "omp", sparsity="0.5", start=Masks({"other.weight": torch.ones(2, 2, dtype=torch.bool)}))
