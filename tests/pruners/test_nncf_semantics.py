"""Expectations of the public tests of NNCF's magnitude pruning, stated for our pruners: the same weights, layer by
layer or over all of them, with shared parameters, and after each step of a schedule.

NNCF counts one weight more where a share does not come out even (it prunes up to and with the one at its threshold), so
that counts are given here as they come out there.
"""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pruners
from pruners.l2 import LayerWiseL2Norm
from sparsity.allocation.budget import step_sparsity
from sparsity.errors import UserError
from sparsity.masks import Masks


def two() -> nn.Sequential:
    """Two layers, the first of which has the larger weights."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -8.0], [9.0, -10.0]])
    model[1].weight.data = torch.tensor([[1.0, -2.0], [3.0, -10.0]])
    return model


def kept(masks: Masks) -> list[list[bool]]:
    return [mask.flatten().tolist() for mask in masks.values()]


def test_local_takes_half_of_each_layer():
    assert kept(pruners.prune(two(), "magnitude", sparsity=0.5)) == [[False, False, True, True]] * 2


def test_global_takes_the_smallest_of_all():
    expected = [[False, True, True, True], [False, False, False, True]]
    assert kept(pruners.prune(two(), "omp", sparsity=0.5)) == expected


class Shared(nn.Module):
    """One linear layer in two places."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(3, 3, bias=False)
        self.first, self.second = nn.Sequential(layer), nn.Sequential(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("pruner", ["magnitude", "omp"])
def test_a_shared_weight_has_one_mask_and_counts_once(pruner):
    masks = pruners.prune(Shared(), pruner, sparsity=Fraction(5, 9))
    assert list(masks) == ["first.0.weight"]
    assert (masks.total, masks.kept) == (9, 4)


def nines_and_tens() -> nn.Sequential:
    """A layer of 8 weights and one of 18, half and a third of which are 9, the others 10."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(9, 2, bias=False))
    model[0].weight.data = torch.tensor([[10.0, 9.0, 9.0, 10.0, 10.0, 9.0, 9.0, 10.0]])
    model[1].weight.data = -torch.tensor([[9.0, 10.0, 10.0, 10.0, 9.0, 10.0, 10.0, 10.0, 9.0]] * 2)
    return model


def test_ties_at_the_threshold():
    """The 10 nines of 26 weights go, from both layers, and no ten does."""
    model = nines_and_tens()
    masks = pruners.prune(model, "omp", sparsity=Fraction(10, 26))
    for layer, mask in zip(model, masks.values(), strict=True):
        assert torch.equal(mask, layer.weight.abs() == 10)


def test_magnitudes_over_the_norm_of_their_layer():
    """Thresholds are 0.219 at 10 %, 0.243 at 50 % and 0.371 at 90 %; up to the first two are the nines of the second
    layer, and all of that layer.
    """
    model = nines_and_tens()
    generator = torch.Generator()
    first, second = (LayerWiseL2Norm().score(layer.weight.detach(), None, generator) for layer in model)
    assert [float(x) for x in (second.min(), second.max(), first.max())] == pytest.approx([0.219, 0.243, 0.371], 0.01)
    nines, all_of_it = pruners.prune(model, "l2", sparsity=[Fraction(6, 26), Fraction(18, 26)])
    assert bool(nines["0.weight"].all()) and torch.equal(nines["1.weight"], model[1].weight.abs() == 10)
    assert bool(all_of_it["0.weight"].all()) and not bool(all_of_it["1.weight"].any())


def ramp() -> nn.Linear:
    """The weights 0 ... 80, in order."""
    model = nn.Linear(81, 1, bias=False)
    model.weight.data = torch.arange(81.0)[None]
    return model


def pruned(masks: Masks) -> int:
    """How many are pruned: the first ones, or this fails."""
    (mask,) = masks.values()
    count = masks.total - masks.kept
    assert mask.flatten().tolist() == [i >= count for i in range(81)]
    return count


@pytest.mark.parametrize(("ratio", "theirs"), [(0.1, 9), (0.2, 17), (0.5, 41), (0.8, 65)])
def test_counts_are_rounded_down_where_theirs_go_up_to_the_threshold(ratio, theirs):
    """Their counts are 0.111, 0.210, 0.506 and 0.802 of 81 weights."""
    ours = pruned(pruners.prune(ramp(), "omp", sparsity=ratio))
    assert ours == int(Fraction(str(ratio)) * 81)
    assert theirs - ours in (0, 1)
    assert pruned(pruners.prune(ramp(), "omp", sparsity=Fraction(theirs, 81))) == theirs


def test_masks_of_several_sparsities_each_begin_with_the_dense_weights():
    """A multi-step schedule 0.2, 0.1, 0.8, of which the second is below the first."""
    shares = [Fraction(count, 81) for count in (17, 9, 65)]
    assert [pruned(masks) for masks in pruners.prune(ramp(), "omp", sparsity=shares)] == [17, 9, 65]
    first = pruners.prune(ramp(), "omp", sparsity=shares[0])
    with pytest.raises(UserError):  # what is pruned stays so, where a run goes on from a mask
        pruners.prune(ramp(), "omp", sparsity=shares[1], start=first)
    assert pruned(pruners.prune(ramp(), "omp", sparsity=shares[2], start=first)) == 65


EXPONENTIAL = [(0, 0.2), (2, 0.39), (4, 0.54), (5, 0.60), (7, 0.69), (8, 0.73), (10, 0.8)]


@pytest.mark.parametrize(("epoch", "expected"), EXPONENTIAL)
def test_the_exponential_schedule(epoch, expected):
    """From 0.2 to 0.8 in 10 epochs. In ours the share of what an initial mask keeps falls by the same factor a step."""
    kept_at_first, target = 1 - 0.2, 1 - (1 - 0.8) / (1 - 0.2)
    lost = step_sparsity(target, epoch, 10, "exp") if epoch else 0
    assert 1 - kept_at_first * (1 - float(lost)) == pytest.approx(expected, rel=0.01)


def test_steps_of_a_schedule_end_at_the_sparsity_and_are_nested():
    """From 0.1 at epoch 0 to 0.9 at epoch 4, where epoch 1 comes to 39 of 81 (0.481)."""
    begin, target = 1 - 0.1, 1 - (1 - 0.9) / (1 - 0.1)
    first = 1 - begin * (1 - float(step_sparsity(target, 1, 4, "exp")))
    assert abs(first * 81 - 39) < 1  # theirs rounds up
    start = pruners.prune(ramp(), "omp", sparsity=Fraction(9, 81))
    last = pruners.prune(ramp(), "omp", sparsity=0.9, start=start, epochs=4, schedule="exp")
    assert pruned(last) == int(0.9 * 81)


def test_the_statistics_of_a_mask(tmp_path):
    """A mask says what it prunes, and is the same when it was saved and loaded."""
    masks = pruners.prune(two(), "magnitude", sparsity=0.5)
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.load(tmp_path / "masks.safetensors")
    assert kept(again) == kept(masks)
    assert (again.total - again.kept) / again.total == 0.5
    assert again["0.weight"].dtype == torch.bool
