"""Outputs after a change of one weight: as a whole pass gives them, without running what the change does not reach."""

import pytest
import torch
from torch import nn

from models.external.model import prunable_view
from sparsity.sensitivity.outputs import Outputs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        return x + scale * torch.tanh(self.fc(x))


class Towers(nn.Module):
    """Two towers and a head; in_place: what the second block of the first one gives is changed after it is given."""

    def __init__(self, in_place=False):
        super().__init__()
        self.left, self.right = (nn.ModuleList([Block(), Block()]) for _ in range(2))
        self.top = Block()
        self.in_place = in_place

    def forward(self, x):
        left = self.left[1](self.left[0](x), scale=0.5)
        if self.in_place:
            left += 1
        return self.top(left * self.right[1](self.right[0](x)))

    @property
    def runs(self):
        return [block.runs for block in (*self.left, *self.right, self.top)]


def changes(model, budget):
    """Return what the output moves by for each weight, and how often each block ran for that."""
    view, batches = (
        prunable_view(model),
        [torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)],
    )
    outputs = Outputs(view, batches, budget)
    found, before = {}, model.runs
    for name, weight in view.weights.items():
        moved = outputs.change(weight, 0.5 * weight.matrix())
        found[name] = moved, [(now - then) / len(batches) for now, then in zip(model.runs, before, strict=True)]
        before = model.runs
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Towers().eval()


def test_only_what_a_change_reaches_is_run(model):
    found, plain = changes(model, None), changes(model, 0)
    assert {name: moved for name, (moved, _) in found.items()} == {name: moved for name, (moved, _) in plain.items()}
    assert all(moved > 0 and runs == [1] * 5 for moved, runs in plain.values())
    assert [runs for _, runs in found.values()] == [
        [1, 1, 0, 0, 1],
        [0, 1, 0, 0, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_calls_beyond_the_budget_are_run(model, calls):
    """A call takes 384 bytes and gives as many; what one gives the next one takes."""
    found, plain = changes(model, 384 * (calls + 1)), changes(model, 0)
    assert {name: moved for name, (moved, _) in found.items()} == {name: moved for name, (moved, _) in plain.items()}
    runs = sum(sum(runs) for _, runs in found.values())
    assert sum(sum(runs) for _, runs in changes(model, None).values()) < runs < 25


def test_what_is_changed_in_place_is_computed_again():
    torch.manual_seed(0)
    model = Towers(in_place=True).eval()
    found, plain = changes(model, None), changes(model, 0)
    assert {name: moved for name, (moved, _) in found.items()} == {name: moved for name, (moved, _) in plain.items()}
    assert found["right.0.fc.weight"][1] == [0, 1, 1, 1, 1], "the block whose output is changed in place runs again"


def test_a_weight_in_two_blocks_reaches_both(model):
    model.right[1].fc.weight = model.left[0].fc.weight
    found, plain = changes(model, None), changes(model, 0)
    assert {name: moved for name, (moved, _) in found.items()} == {name: moved for name, (moved, _) in plain.items()}
    assert found["left.0.fc.weight"][1] == [1, 1, 0, 1, 1]
