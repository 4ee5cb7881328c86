"""Input norms against the naive sum, for every way in which a layer can be called; and that nothing is left behind."""

import re
from threading import Thread

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity.statistics import inputs as module
from sparsity.statistics.checks import check_weights
from sparsity.statistics.inputs import Statistics, input_norms, untouched
from sparsity.statistics.passes import PASSES, collect
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
    """It cannot know which layers share their inputs, and takes part in the sums of those that do all the same."""
    batch = torch.randn(2, 8)
    found = on_ranks(lambda: view_of(Attention(), keep_dense=["head"]), [[batch], []], ["input_norms"])
    for rank in found:
        norms = rank["input_norms"]
        torch.testing.assert_close(norms["q.weight"], naive([batch]))
        assert norms["q.weight"] is norms["k.weight"] is norms["v.weight"]
        assert norms["up.weight"] is not norms["q.weight"]


# Layers that read the same input share its sum


def on_ranks(make, shares, statistics, **options):
    """Return what each rank gets from `collect` over its share of the batches, or the message of its error."""
    reduce, results = Ranks(len(shares)), {}

    def work(rank, batches):
        try:
            results[rank] = collect(make(), statistics, batches, reduce=reduce, **options)
        except ValueError as error:
            results[rank] = str(error)

    threads = [Thread(target=work, args=item) for item in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(len(shares))]


class Turning(nn.Module):
    """Layers that all read one tensor, or every second one another, as the batch says."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(width, 3) for _ in range(4))

    def forward(self, batch):
        kind, x = batch
        other = x if kind == "same" else x + 1
        self.a(x), self.b(other), self.c(x), self.d(other)
        if kind == "twice":
            self.a(x), self.c(other)


def alone(model, batches, measure):
    """The sums that each layer has with a view of itself alone."""
    found = {}
    for name in ("a", "b", "c", "d"):
        with Statistics(view_of(model), measure, [f"{name}.weight"]) as statistics:
            for batch in batches:
                statistics.add(batch)
        found |= statistics.result()
    return found


@pytest.mark.parametrize("measure", ["gram", "input_norms", "input_sums"])
@pytest.mark.parametrize(
    ("kinds", "sums"),
    [(["same"] * 3, 1), (["same", "other"], 2), (["other", "same", "other"], 2), (["same", "twice", "same"], 3)],
)
def test_layers_share_a_sum_as_long_as_their_inputs_are_the_same(measure, kinds, sums):
    model, generator = Turning(), torch.Generator().manual_seed(1)
    batches = [(kind, torch.randn(5, 6, generator=generator)) for kind in kinds]
    with Statistics(view_of(model), measure) as statistics:
        for batch in batches:
            statistics.add(batch)
    found = statistics.result()
    assert len({id(total) for total in found.values()}) == sums
    for name, expected in alone(model, batches, measure).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(
    ("shares", "sums"),
    [
        ([["same"], ["same"], []], 1),
        ([["other"], ["other", "same"], []], 2),
        ([["same", "same"], ["twice"]], 4),
    ],
)
def test_ranks_share_what_all_of_them_share(shares, sums):
    generator = torch.Generator().manual_seed(1)
    given = [[(kind, torch.randn(5, 6, generator=generator)) for kind in kinds] for kinds in shares]
    expected = collect(view_of(Turning()), "hessian", [batch for share in given for batch in share])
    for found in on_ranks(lambda: view_of(Turning()), given, ["hessian", "input_means"]):
        assert len({id(total) for total in found["hessian"].values()}) == sums
        for name, hessian in expected.items():
            torch.testing.assert_close(found["hessian"][name], hessian, rtol=1e-12, atol=1e-12)


def test_several_statistics_come_from_one_pass_and_are_those_of_one_each():
    def batches():
        for batch in torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(2)).unbind():
            read.append(batch)
            yield batch

    read, model = [], Attention()
    view = view_of(model, loss=lambda batch, _: model(batch).square().mean())
    wanted = [statistic for statistic in PASSES if statistic != "squared_gradient"]  # a pass of its own
    found = collect(view, wanted, batches())
    assert list(found) == wanted and len(read) == 3
    for statistic in wanted:
        expected = collect(view, statistic, batches())
        assert list(expected) == list(view.weights)
        for name in expected:
            assert torch.equal(found[statistic][name], expected[name]), (statistic, name)
    tokens = torch.cat(read[:3]).double()
    torch.testing.assert_close(found["input_means"]["q.weight"], tokens.mean(0), rtol=1e-12, atol=1e-15)
    assert collect(view, ["hessian"], batches(), names=[]) == {"hessian": {}}


def test_a_part_of_the_model_takes_the_place_of_its_forward():
    model, batch = Attention(), torch.randn(3, 8)
    with Statistics(view_of(model), "input_norms", ["down.weight"]) as statistics:
        statistics.add(None, run=lambda: model.down(torch.ones(5, 16)))
        statistics.add(batch, run=lambda: model.down(torch.ones(2, 16)))
    assert torch.equal(statistics.result()["down.weight"], torch.full((16,), 7.0, dtype=torch.float64))


class Launches(TorchDispatchMode):
    """Counts operations, each of which is about one launch on an accelerator."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("measure", ["input_norms", "input_sums"])
@pytest.mark.parametrize("shape", [(4, 8), (23424, 11008)])
def test_an_accelerator_takes_one_reduction_an_input(measure, shape):
    rows = torch.empty(shape, device="meta", dtype=torch.bfloat16)  # as any device but the CPU
    with Launches() as launches:
        result = module.MEASURES[measure](rows)
    assert launches.count <= 6 and result.dtype == torch.float64


# Errors are early and complete


def sometimes():
    """A batch says which of two layers reads it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})

    def forward(batch):
        for name in batch[0]:
            model[name](batch[1])

    return view_of(model, forward=forward)


def test_layers_that_nothing_reaches_are_all_named_first_in_a_warning(caplog):
    def batches():
        yield "a", torch.ones(2, 4)
        assert "layers 'b.weight', 'c.weight' saw no calibration sample in the first batch" in caplog.text
        yield "ab", torch.ones(2, 4)

    with pytest.raises(ValueError, match="^layer 'c.weight' saw no calibration sample; keep it dense"):
        collect(sometimes(), "input_norms", batches())


@pytest.mark.parametrize("shares", [[["a"], ["b"]], [["a", "b"], []], [["b"], ["b", "a"]]])
def test_what_any_rank_has_seen_is_seen(shares):
    given = [[(names, torch.ones(2, 4)) for names in share] for share in shares]
    for found in on_ranks(sometimes, given, "input_norms", names=["a.weight", "b.weight"]):
        assert set(found) == {"a.weight", "b.weight"}
    message = "layer 'c.weight' saw no calibration sample; keep it dense (keep_dense, --exclude)"
    assert on_ranks(sometimes, given, "input_norms") == [message] * 2


def test_nan_is_an_error_after_the_first_batch_on_every_rank():
    def batches():
        yield "ac", torch.full((2, 4), float("nan"))
        raise AssertionError("the second batch is not read")

    message = "the inputs of layer 'a.weight' hold NaN or Inf (also of c.weight)"
    with pytest.raises(ValueError, match=re.escape(message)):
        collect(sometimes(), "gram", batches())
    fine = [("b", torch.ones(2, 4))]
    assert on_ranks(sometimes, [batches(), fine], "input_norms") == [message] * 2


def test_weights_that_are_not_finite_are_all_named():
    view = view_of(Attention())
    check_weights(view)
    with torch.no_grad():
        view.model.k.weight[0, 0], view.model.down.weight[1, 1] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match=r"^the weights of layer 'k.weight' hold NaN or Inf \(also of down.weight\)$"):
        check_weights(view)


@pytest.mark.parametrize("statistic", ["input_norms", "mean_gradient"])
def test_data_that_ends_early_is_used_and_said(caplog, statistic):
    model, batches = Attention(), list(torch.randn(5, 2, 8).unbind())
    view = view_of(model, loss=lambda batch, _: model(batch).square().mean())
    expected = collect(view, statistic, batches)
    assert not caplog.records
    found = collect(view, statistic, iter(batches), announced=8)
    assert "5 of 8 batches came" in caplog.text
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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
