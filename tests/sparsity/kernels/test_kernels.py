"""Kernels give the outputs of the dense layer, and what is chosen for a layer is the fastest way that was tried."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import pruners
from sparsity.kernels import accelerate as module
from sparsity.kernels.accelerate import accelerate
from sparsity.kernels.candidates import CSR, DENSE, SEMI, candidates
from sparsity.kernels.linear import SparseLinear
from sparsity.kernels.semi_structured import SemiStructuredLinear, is_two_of_four, why_not
from sparsity.masks import Masks
from sparsity.pattern import NM, Block
from tests.toys import Attention, Conv1D, view_of


def sparse(rows: int, columns: int, keep: float, block: Block | None = None, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if block is None:
        return weight * (torch.rand(rows, columns, generator=generator) < keep)
    kept = torch.rand(rows // block.rows, columns // block.columns, generator=generator) < keep
    return weight * block.expand(kept)


@pytest.mark.parametrize("block", [None, Block(4, 4), Block(16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32), (600, 32), (0, 32)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_output_is_that_of_the_dense_layer(block: Block | None, shape: tuple[int, ...], bias: bool) -> None:
    weight = sparse(48, 32, 0.2, block)
    inputs, offset = torch.randn(shape), torch.randn(48) if bias else None
    layer = SparseLinear(weight, offset, block)
    expected = nn.functional.linear(inputs, weight, offset)
    # Sums of at most 32 products of numbers of order 1, in another order.
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=32 * 32 * torch.finfo(torch.float32).eps)
    assert torch.equal(layer.weight, weight)
    wanted = weight.count_nonzero() if block is None else block.reduce((weight != 0).float()).gt(0).sum() * block.numel
    assert layer.stored == wanted


def test_sums_without_rounding_are_equal_to_the_bit() -> None:
    weight = sparse(16, 64, 0.3, Block(4, 4)).mul(8).round()
    inputs = torch.randint(-8, 8, (300, 64)).float()
    for block in (None, Block(4, 4), Block(16, 16)):
        assert torch.equal(SparseLinear(weight, None, block)(inputs), inputs @ weight.t())


@pytest.mark.parametrize("block", [None, Block(4, 4)], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_take_pieces_of_inputs(block: Block | None, mode: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsity.kernels.linear._OF_WEIGHTS", 32 * 64)  # 600 inputs are 19 pieces
    monkeypatch.setattr("sparsity.kernels.linear._OF_BLOCKS", 32 * 64)
    layer = SparseLinear(sparse(16, 64, 0.3, block).mul(8).round(), torch.arange(16.0), block)
    inputs = torch.randint(-8, 8, (600, 64)).float().requires_grad_()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with mode():
            assert torch.equal(layer(inputs), inputs.detach() @ layer.weight.t() + torch.arange(16.0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_layer_that_is_all_zeros_gives_its_bias() -> None:
    for block in (None, Block(4, 4)):
        assert torch.equal(SparseLinear(torch.zeros(8, 8), torch.arange(8.0), block)(torch.ones(8)), torch.arange(8.0))


def pruned(keep_share: float = 0.1) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 3)).eval()
    model[0].weight.data = sparse(128, 64, keep_share)
    model[2].weight.data = sparse(64, 128, keep_share, Block(16, 16), seed=1)
    return model, torch.randn(4, 10, 64)


def timed(seconds: dict[str, float]):
    """Return a trial that measures these seconds, and 9 for every other way."""
    return lambda layers, inputs, **_: {kind: seconds.get(kind, 9.0) for kind in layers}


def test_the_fastest_way_is_put_in_place_and_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pruned()
    own, expected = list(model), model(batch)
    monkeypatch.setattr(module, "_trial", timed({DENSE: 1.0, CSR: 0.5, "block4x4": 0.4}))
    fast = accelerate(model, batch=batch)
    assert [choice.kind for choice in fast.choices] == [CSR, "block4x4", DENSE]
    assert [choice.tokens for choice in fast.choices] == [40] * 3
    assert [choice.gain for choice in fast.choices] == [2.0, 2.5, 1.0]
    assert [type(layer) for layer in model] == [SparseLinear, nn.GELU, SparseLinear, nn.Linear]
    torch.testing.assert_close(model(batch), expected)
    fast.restore()
    assert all(now is before for now, before in zip(model, own, strict=True)) and torch.equal(model(batch), expected)
    fast.engage()
    assert model[0] is not own[0]
    table = fast.table()
    assert table.count("\n") == 4 and "| 0 | 128 x 64 |" in table and "CSR: 100% of the weights are kept" in table


def test_nothing_within_the_noise_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pruned()
    monkeypatch.setattr(module, "_trial", timed({DENSE: 1.0, CSR: 0.96}))
    fast = accelerate(model, batch=batch)
    assert {choice.kind for choice in fast.choices} == {DENSE} and "within the noise" in fast.choices[0].why
    assert isinstance(model[0], nn.Linear)


def test_dense_weights_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pruned(0.9)
    monkeypatch.setattr(module, "_trial", lambda *_, **__: pytest.fail("there is nothing to try"))
    assert {choice.kind for choice in accelerate(model, batch=batch).choices} == {DENSE}


def test_masks_prune_first_and_tied_layers_stand_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Attention(16).eval()
    view, batch = view_of(model), torch.randn(5, 16)
    masks = pruners.prune(view, "l2", sparsity="0.9")
    assert isinstance(masks, Masks)
    with masks.applied(view):
        expected = model(batch)
    monkeypatch.setattr(module, "_trial", timed({DENSE: 1.0, CSR: 0.5}))
    fast = accelerate(view, masks, batch=batch)
    assert isinstance(model.up, SparseLinear) and isinstance(model.again, SparseLinear)
    torch.testing.assert_close(model(batch), expected)
    assert len(fast.choices) == 7  # q, k, v, up, again, down, head


def test_what_is_not_called_and_what_stores_its_weight_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.read = Conv1D(32, 16), nn.Linear(32, 8)
            self.conv.weight.data = sparse(16, 32, 0.1)
            self.read.weight.data = sparse(8, 32, 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.conv(x), self.read.weight)

    model, batch = Odd(), torch.randn(6, 16)
    expected = model(batch)
    monkeypatch.setattr(module, "_trial", timed({DENSE: 1.0, CSR: 0.5}))
    fast = accelerate(model, batch=batch)
    assert isinstance(model.conv, SparseLinear) and isinstance(model.read, nn.Linear)
    assert "not called as a layer" in fast.choices[1].why
    torch.testing.assert_close(model(batch), expected)


def test_a_real_trial_chooses_what_it_measured() -> None:
    model, batch = pruned(0.02)
    expected = copy.deepcopy(model)(batch)
    fast = accelerate(model, batch=batch, rounds=3)
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
    for choice in fast.choices[:2]:
        assert set(choice.seconds) >= {DENSE, CSR} and choice.seconds[choice.kind] <= choice.seconds[DENSE]


def test_why_other_ways_are_not_tried() -> None:
    ways, reasons = candidates(sparse(30, 32, 0.1), None, 4)
    assert list(ways) == [CSR] and reasons == ["block4x4: does not divide it", "block16x16: does not divide it"]
    assert candidates(torch.zeros(4, 4, dtype=torch.float16), None, 4) == ({}, ["no sparse kernel for float16 on cpu"])
    assert why_not(torch.zeros(4, 4)) == "2:4 needs a GPU"


def test_a_kernel_that_this_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("requires MKL\nand more")

    model, batch = pruned()
    monkeypatch.setattr(SparseLinear, "forward", missing)
    fast = accelerate(model, batch=batch)
    assert {choice.kind for choice in fast.choices} == {DENSE}
    assert "CSR: requires MKL;" in fast.choices[0].why + ";"


def test_two_of_four_is_told_also_where_four_does_not_divide_the_inputs() -> None:
    weight = torch.randn(8, 18)
    weight[:, :16] *= NM(2, 4).keep(weight[:, :16].abs())
    assert is_two_of_four(weight)
    weight[3, 4:7] = 1.0
    assert not is_two_of_four(weight)


@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_two_of_four_is_padded_to_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """The kernel is replaced by a dense product that refuses what the real one refuses."""
    taken = []

    def compress(weight: torch.Tensor) -> torch.Tensor:
        assert weight.shape[0] % 16 == weight.shape[1] % 16 == 0 and weight.is_contiguous()
        return weight

    def product(packed, dense, *, bias, transpose_result, alg_id):
        assert transpose_result and dense.shape[1] % 8 == 0 and bias.shape[0] == packed.shape[0] and alg_id == 3
        return (packed @ dense).t() + bias

    def search(packed, dense, *, bias, transpose_result):
        taken.append(dense.shape[1])
        return 3

    for name, function in (("", product), ("_search", search)):
        monkeypatch.setattr(torch.ops.aten, f"_cslt_sparse_mm{name}", function)
    monkeypatch.setattr(torch.ops.aten, "_cslt_compress", compress)
    weight, bias, inputs = sparse(20, 36, 0.5), torch.randn(20), torch.randn(tokens, 36)
    layer = SemiStructuredLinear(weight, bias, tokens)
    torch.testing.assert_close(layer(inputs[:, None]), nn.functional.linear(inputs, weight, bias)[:, None])
    assert taken == [tokens + -tokens % 8]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs compute capability 8.0"
)
@pytest.mark.parametrize("shape", [(96, 64), (100, 36)], ids=str)
def test_two_of_four_on_a_gpu(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    weight *= NM(2, 4).keep(weight.float().abs())
    inputs, bias = torch.randn(7, shape[1], device="cuda").bfloat16(), torch.randn(shape[0], device="cuda").bfloat16()
    ways, _ = candidates(weight, bias, 7)
    torch.testing.assert_close(ways[SEMI]()(inputs), nn.functional.linear(inputs, weight, bias), rtol=2e-2, atol=5e-2)


class Doubled(nn.Linear):
    """A linear layer that computes more."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


def test_what_computes_more_than_a_product_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_trial", timed({CSR: 1.0}))
    model, batch = pruned()
    own = Doubled(64, 128)
    own.weight.data, model[0] = model[0].weight.data, own
    model[2].register_forward_hook(lambda layer, inputs, output: 2 * output)
    expected = model(batch)
    found = accelerate(model, batch=batch)
    assert [choice.kind for choice in found.choices] == [DENSE] * 3
    assert torch.equal(model(batch), expected)


def test_attention_of_torch_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    for parameter in (model.self_attn.in_proj_weight, model.self_attn.out_proj.weight):
        parameter.data *= torch.rand_like(parameter) < 0.05
    batch = torch.randn(2, 5, 32)
    expected = model(batch)
    accelerate(model, batch=batch)
    torch.testing.assert_close(model(batch), expected)
