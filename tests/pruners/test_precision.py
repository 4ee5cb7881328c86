"""Models in every floating-point type: no pruner writes to one, and half precision loses no bits of the masks."""

import copy

import pytest
import torch
from torch import nn

import pruners
from sparsity.learned.scores import learn, start_from_magnitude
from sparsity.pattern import parse_pattern
from sparsity.statistics.gradient_rows import gradient_rows
from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView
from tests.sparsity.learned.choices import choice
from tests.toys import Conv1D

pytestmark = pytest.mark.script  # long: left out of make test-fast

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTH = 16


class Net(nn.Module):
    """Tied layers, a transposed one and a norm; all widths divide by 4."""

    def __init__(self, width=WIDTH, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.first.weight
        self.conv, self.norm, self.last = Conv1D(2 * width, width), nn.LayerNorm(width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, batch):
        x = batch[0]
        x = self.norm(x + self.again(self.first(x).relu()))
        return self.head(self.last(self.conv(x).relu()))


def view_of(model):
    def loss(batch, generator=None):
        return nn.functional.cross_entropy(model(batch), batch[1])

    return PrunableView(
        model, group_of=lambda name: "all", keep_dense=["head"], forward=model, loss=loss, blocks=[model.last]
    )


def batches_of(dtype, count=3, size=8, width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(size, width, generator=generator) for _ in range(count)]
    labels = [torch.randint(4, (size,), generator=generator) for _ in range(count)]
    return [(x.to(torch.bfloat16).to(dtype), y) for x, y in zip(data, labels, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pruners.available())
def test_no_pruner_changes_the_model_or_its_batches_by_a_bit(name, dtype):
    model = Net().to(dtype)
    view, batches = view_of(model), batches_of(dtype)
    before, read = copy.deepcopy(model.state_dict()), copy.deepcopy(batches)
    choices = [{"sparsities": [0.5]}, {"sparsities": None, "pattern": parse_pattern("2:4")}]
    options = [{}, *([{"enable_update": True}] if pruners.updates(name) else [])]
    for given in options:
        for wanted in choices:
            pruner = pruners.build(name, **given)
            ((_, masks),) = pruner.prune(view, batches, **wanted)
            assert masks.total - masks.kept == masks.total // 2, (given, wanted)
            assert all(weight.dtype == dtype for weight in masks.weights.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for old, new in zip(read, batches, strict=True) for a, b in zip(old, new, strict=True))


class Float64:
    """A float64 view on the very values of a model in another type: float64 arithmetic on the same numbers.

    Its weights are the model's. Its layers read what the model's layers read, the gradient of its loss is the model's
    on each batch, both widened and not computed anew: how a forward or backward rounds is the model's own affair.
    Where the weights of the view are masked meanwhile, those of the model follow.
    """

    def __init__(self, model):
        self.model, self.double = copy.deepcopy(model), copy.deepcopy(model).double()
        self.view = view_of(self.double)
        self.view.blocks, self.view._forward, self.view._loss = None, self.forward, self.loss
        self.layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]

    def follow(self):
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.double.parameters(), strict=True):
                mine.copy_(theirs)

    def forward(self, batch):
        self.follow()
        read, handles = [], []
        for name in self.layers:
            hook = lambda layer, args, name=name: read.append((name, args[0].detach().double()))  # noqa: E731
            handles.append(self.model.get_submodule(name).register_forward_pre_hook(hook))
        self.model(batch)
        for handle in handles:
            handle.remove()
        for name, x in read:
            self.double.get_submodule(name)(x)

    def loss(self, batch, generator=None):
        self.follow()
        for parameter in self.model.parameters():
            parameter.grad = None
        nn.functional.cross_entropy(self.model(batch), batch[1]).backward()
        gradients = {name: parameter.grad.double() for name, parameter in self.model.named_parameters()}
        return sum((parameter * gradients[name]).sum() for name, parameter in self.double.named_parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", pruners.available())
def test_masks_are_those_of_float64_arithmetic_on_the_same_values(name, dtype):
    """Half precision, too: at least 999 of 1000 weights, in one pool and in groups."""
    model = Net(width=64).to(dtype)
    view, batches = view_of(model), batches_of(dtype, width=64)
    view.blocks = None
    options = [{}, *([{"enable_update": True}] if pruners.updates(name) else [])]
    for given in options:
        for wanted in ({"sparsities": [0.63]}, {"sparsities": None, "pattern": parse_pattern("2:4")}):
            ((_, masks),) = pruners.build(name, **given).prune(view, batches, **wanted)
            ((_, exact),) = pruners.build(name, **given).prune(Float64(model).view, batches, **wanted)
            assert agreement(masks, exact) >= 0.999, (given, wanted)


def test_float64_views_have_the_inputs_and_gradients_of_the_model():
    model, batches = Net().bfloat16(), batches_of(torch.bfloat16)
    wide = Float64(model).view
    for statistic in ("input_norms", "mean_gradient"):
        found, expected = collect(wide, statistic, batches), collect(view_of(model), statistic, batches)
        for name in expected:
            assert found[name].dtype == torch.float64
            torch.testing.assert_close(found[name], expected[name].double(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_half_precision_are_those_of_its_values(dtype):
    """Without data, a half-precision model and its float64 copy have the same weights: the same masks."""
    half, double = view_of(Net().to(dtype)), view_of(Net().to(dtype).double())
    for name in ("omp", "localmp", "magnitude", "l2", "lamp", "rand"):
        found = [next(pruners.build(name).prune(view, None, [0.63]))[1].digest() for view in (half, double)]
        assert found[0] == found[1], name


def agreement(one, other):
    same = sum(int((one[name] == other[name]).sum()) for name in one)
    return same / one.total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_snip_of_half_precision_adds_up_a_hundred_batches_as_float64_does(dtype):
    model = Net(width=64).to(dtype)
    view, batches = view_of(model), batches_of(dtype, count=100, width=64)
    ((_, masks),) = pruners.build("snip").prune(view, batches, [0.63])
    ((_, exact),) = pruners.build("snip").prune(Float64(model).view, batches, [0.63])
    assert agreement(masks, exact) >= 0.999
    for name, gradient in mean_gradients(view, batches).items():
        assert gradient.dtype == torch.float32, name


def test_gradients_of_many_batches_are_within_float32_of_their_sum():
    view, batches = view_of(Net().bfloat16()), batches_of(torch.bfloat16, count=300, size=2)
    found = mean_gradients(view, batches)
    each = [mean_gradients(view, [batch]) for batch in batches]
    for name, gradient in found.items():
        expected = sum(one[name].double() for one in each) / len(each)
        scale = sum(one[name].double().abs() for one in each) / len(each)
        assert ((gradient.double() - expected).abs() <= 1e-5 * scale).all(), name


def test_rows_of_several_batches_add_up_in_float32():
    view, batches = view_of(Net().bfloat16()), batches_of(torch.bfloat16, count=200, size=2)
    rows = gradient_rows(view, batches, rounds=[100, 100], budget=1 << 30)
    halves = [mean_gradients(view, batches[:100]), mean_gradients(view, batches[100:])]
    for i, half in enumerate(halves):
        expected = torch.cat([gradient.reshape(-1) for gradient in half.values()])
        torch.testing.assert_close(rows.read(0, rows.width)[i], expected, rtol=1e-5, atol=1e-8)


def test_tamt_steps_along_sums_in_float32():
    """Two hundred batches a step, in bfloat16: the scores go the way of the float64 model's."""
    batches = batches_of(torch.bfloat16, count=200, size=2)
    learned = []
    for model in (Net().bfloat16(), Net().bfloat16().double()):
        data = [(x.to(model.head.weight.dtype), y) for x, y in batches]
        view = view_of(model)
        start, choose = start_from_magnitude(view, 0.5), choice(view, 0.5)
        learned.append(learn(view, start, choose, data, rounds=[200], lr=1e-3, weight_decay=0.01))
    same = [(a.double() - b).abs() < 1e-4 for a, b in zip(*(each.values() for each in learned), strict=True)]
    assert torch.cat([each.flatten() for each in same]).double().mean() > 0.98
