"""Input norms against the naive sum, for every way in which a layer can be called; and that nothing is left behind."""

import copy
from threading import Thread

import pytest
import torch
from torch import nn

from sparsity.statistics import inputs as module
from sparsity.statistics.inputs import Statistics, input_norms, untouched
from tests.toys import Attention, Conv1D, Ranks, view_of


def gather(view, batches):
    with Statistics(view, "input_norms") as statistics:
        for batch in batches:
            statistics.add(batch)
    return statistics


def inputs_of(model, batches):
    """All inputs of each layer, by plain hooks: layer -> list of tensors."""
    seen = {}
    handles = [
        layer.register_forward_hook(lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return seen


def naive(tensors):
    return sum(t.double().reshape(-1, t.shape[-1]).square().sum(0) for t in tensors)


def hooks(model):
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.modules())


@pytest.mark.parametrize("leading", [(1,), (5,), (1, 3), (2, 3), (2, 3, 4)])
def test_norms_are_the_naive_sum_whatever_the_leading_dimensions(leading):
    torch.manual_seed(0)
    model = Attention().eval()
    batches = [torch.randn(*leading, 8) for _ in range(3)]
    expected = inputs_of(model, batches)
    statistics = gather(view_of(model), batches)
    result = statistics.result()
    for name in ("q", "k", "v", "down", "head"):
        assert result[f"{name}.weight"].dtype == torch.float64
        torch.testing.assert_close(result[f"{name}.weight"], naive(expected[name]), rtol=1e-12, atol=0)
        assert statistics.samples[f"{name}.weight"] == 3 * leading[0]
    tied = naive(expected["up"]) + naive(expected["again"])
    torch.testing.assert_close(result["up.weight"], tied, rtol=1e-12, atol=0)
    assert statistics.samples["up.weight"] == 6 * leading[0]


def test_long_inputs_are_summed_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 20)
    rows = torch.randn(101, 8)
    torch.testing.assert_close(input_norms(rows), naive([rows]), rtol=1e-12, atol=0)


def test_layers_that_share_an_input_measure_it_once(monkeypatch):
    calls = []

    def counting(rows):
        calls.append(rows.shape)
        return input_norms(rows)

    monkeypatch.setitem(module.MEASURES, "input_norms", counting)
    gather(view_of(Attention(), keep_dense=["head"]), [torch.randn(2, 8)])
    assert sum(shape[0] > 0 for shape in calls) == 3  # x (of q, k, v and again), mixed, and the input of down


class Reuse(nn.Module):
    """The second layer reads the first one's input after it was changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.a(x)
        return self.b(input=x.mul_(2))


def test_an_input_changed_in_place_is_measured_again():
    batch = torch.randn(3, 4)
    expected = naive([batch])
    result = gather(view_of(Reuse()), [batch]).result()
    torch.testing.assert_close(result["a.weight"], expected)
    torch.testing.assert_close(result["b.weight"], 4 * expected)


def test_padding_never_counts_even_when_it_is_nan():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x = torch.randn(2, 3, 4)
    real = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x[real == 0] = float("nan")
    asked = []

    def valid_tokens(key, batch):
        asked.append(key)
        return real if key.startswith("a") else None

    def forward(batch):
        model["a"](batch)
        model["b"](batch.nan_to_num(0))

    statistics = gather(view_of(model, forward=forward, valid_tokens=valid_tokens), [x])
    result = statistics.result()
    torch.testing.assert_close(result["a.weight"], naive([x[real.bool()]]))
    torch.testing.assert_close(result["b.weight"], naive([x.nan_to_num(0)]))
    assert asked == ["a.weight", "b.weight"]


def test_each_use_of_a_tied_weight_is_asked_about_its_own_tokens():
    model = Attention()
    masks = {"up.weight": torch.tensor([[1, 0]]), "again.weight": torch.tensor([[0, 1]])}
    batch = torch.randn(1, 2, 8)
    view = view_of(model, valid_tokens=lambda key, _: masks.get(key))
    expected = inputs_of(model, [batch])
    result = gather(view, [batch]).result()
    torch.testing.assert_close(result["up.weight"], naive([expected["up"][0][:, 0], expected["again"][0][:, 1]]))


def test_a_shared_input_with_other_real_tokens_is_measured_again():
    model = Attention()
    masks = {"q.weight": torch.tensor([[1, 0]]), "k.weight": torch.tensor([[0, 1]])}
    batch = torch.randn(1, 2, 8)
    result = gather(view_of(model, valid_tokens=lambda key, _: masks.get(key)), [batch]).result()
    for name, tokens in (("q", batch[:, 0]), ("k", batch[:, 1]), ("v", batch)):
        torch.testing.assert_close(result[f"{name}.weight"], naive([tokens]))


def test_valid_tokens_of_another_shape_are_an_error():
    view = view_of(Attention(), valid_tokens=lambda key, batch: torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"'q.weight' has inputs \(2, 3, 8\)"):
        gather(view, [torch.randn(2, 3, 8)])


def test_conv1d_counts_its_inputs():
    model = nn.Sequential(Conv1D(3, 5))
    batch = torch.randn(2, 5)
    torch.testing.assert_close(gather(view_of(model), [batch]).result()["0.weight"], naive([batch]))


def test_a_layer_without_samples_is_an_error_that_names_it():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "forgotten": nn.Linear(4, 4)})
    view = view_of(model, forward=lambda batch: model["used"](batch))
    with pytest.raises(ValueError, match="'forgotten.weight' saw no calibration sample"):
        gather(view, [torch.randn(2, 4)]).result()


def test_a_layer_that_saw_padding_only_is_an_error_too():
    view = view_of(Attention(), valid_tokens=lambda key, batch: torch.zeros(2) if key == "v.weight" else None)
    with pytest.raises(ValueError, match="'v.weight' saw no calibration sample"):
        gather(view, [torch.randn(2, 8)]).result()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_name_the_layer(bad):
    batch = torch.randn(2, 8)
    batch[0, 0] = bad
    with pytest.raises(ValueError, match="inputs of layer 'q.weight' hold NaN or Inf"):
        gather(view_of(Attention()), [batch]).result()


def test_ranks_add_up():
    torch.manual_seed(0)
    view = view_of(Attention())
    batches = [torch.randn(2, 8), torch.randn(3, 8)]
    ranks = [gather(view, [batch]) for batch in batches]
    sent = []
    ranks[1].reduce(lambda tensor: sent.append(tensor.clone()) or tensor)
    received = iter(sent)
    ranks[0].reduce(lambda tensor: tensor + next(received))
    together = gather(view, batches)
    assert ranks[0].samples == together.samples
    for name, value in ranks[0].result().items():
        torch.testing.assert_close(value, together.result()[name], rtol=1e-12, atol=0)


def test_a_rank_without_data_takes_part():
    """It gives as many tensors, of the same shapes, as the rank that has read some, and gets what that one gets."""
    torch.manual_seed(0)
    model, data, reduce = Attention(), torch.randn(3, 8), Ranks(2)
    alone, shapes = gather(view_of(model), [data]), ([], [])
    ranks = [gather(view_of(copy.deepcopy(model)), read) for read in ([], [data])]

    def work(rank):
        ranks[rank].reduce(lambda tensor: shapes[rank].append(tuple(tensor.shape)) or reduce(tensor))

    threads = [Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes[0] == shapes[1] != []
    for gathered in ranks:
        assert gathered.samples == alone.samples and gathered.tokens == alone.tokens
        assert all(torch.equal(value, alone.result()[name]) for name, value in gathered.result().items())


class Restless(nn.Module):
    """Moves buffers and a small parameter in every forward, in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.temp = nn.Parameter(torch.tensor(5.0))
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("pointer", torch.zeros(1))
        self.register_buffer("lazy", None)
        self.fail = False

    def forward(self, x):
        assert not self.dropout.training and not torch.is_grad_enabled()
        self.temp.clamp_(0.001, 0.5)
        self.a.bias.data = self.a.bias.data + 1
        self.queue[0] += 1
        self.pointer = self.pointer + 1
        self.lazy = x
        y = self.b(self.dropout(self.norm(self.a(x))))
        if self.fail:
            raise RuntimeError("out of memory")
        return y


@pytest.mark.parametrize("fail", [False, True])
def test_no_trace_is_left_also_after_an_exception(fail):
    model = Restless().train()
    model.norm.eval()
    model.fail = fail
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = dict(model.named_buffers()), dict(model.named_parameters())
    flags = [layer.training for layer in model.modules()]
    if fail:
        with pytest.raises(RuntimeError, match="out of memory"):
            gather(view_of(model), [torch.randn(2, 4)])
    else:
        gather(view_of(model), [torch.randn(2, 4)])
    assert hooks(model) == 0
    assert [layer.training for layer in model.modules()] == flags
    assert model.lazy is None and torch.is_grad_enabled()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    for before, after in zip(objects, (dict(model.named_buffers()), dict(model.named_parameters())), strict=True):
        assert all(before[name] is after[name] for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_large_parameter_is_not_copied_but_its_change_is_noticed():
    model = nn.Linear(512, 512)
    original = model.weight.data_ptr(), model.weight.detach().clone()
    with untouched(model):
        model.weight.data = model.weight.data * 2
    assert model.weight.data_ptr() == original[0] and torch.equal(model.weight, original[1])
    with pytest.raises(RuntimeError, match="changed 'weight' in place"), untouched(model), torch.no_grad():
        model.weight.mul_(2)


def test_an_unknown_statistic_is_an_error():
    with pytest.raises(ValueError, match="no statistic 'hessian'"):
        Statistics(view_of(Attention()), "hessian")
