"""Weights rounded to 8 bits."""

import torch

from engine.pruning.rounding import int8_weights
from tests.toys import Attention, Conv1D, layers, view_of


def test_each_channel_lies_on_its_own_grid_of_255_values():
    view = view_of(layers((6, 40), (5, 7)))
    view.weights["a.weight"].parameter.data[2] = 0
    before = {name: weight.matrix().clone() for name, weight in view.weights.items()}
    with int8_weights(view).applied(view):
        for name, weight in view.weights.items():
            for old, new in zip(before[name], weight.matrix(), strict=True):
                step = float(old.abs().max()) / 127
                if step == 0:
                    assert not new.any()
                    continue
                assert float((new - old).abs().max()) <= step / 2 * (1 + 1e-5)
                levels = new.double() / step
                assert float((levels - levels.round()).abs().max()) < 1e-4 and len(levels.round().unique()) <= 255
                assert torch.isclose(new.abs().max(), old.abs().max())
    assert all(torch.equal(weight.matrix(), before[name]) for name, weight in view.weights.items())


def test_nothing_is_pruned_and_tied_weights_are_rounded_once():
    view = view_of(Attention(), group_of=lambda name: "all", keep_dense=["head"])
    rounded = int8_weights(view)
    assert rounded.kept == rounded.total == view.numel and "again.weight" not in rounded.weights
    with rounded.applied(view):
        assert torch.equal(view.model.again.weight, view.model.up.weight)


def test_conv1d_is_rounded_by_output_too():
    view = view_of(torch.nn.Sequential(Conv1D(3, 9)), group_of=lambda name: "all")
    (weight,) = view.weights.values()
    (rounded,) = int8_weights(view).weights.values()  # as it is stored, (in, out)
    step = weight.parameter.abs().amax(0) / 127
    assert torch.allclose(rounded, (weight.parameter / step).round() * step)
