"""Packed weights come back bit by bit, take what the format promises, and damage is named."""

import json
import math

import pytest
import torch
from safetensors.torch import load, save

from sparsity.packing import pack, unpack
from sparsity.pattern import NM, Block, patterns_of


def sparse(pattern, shape=(24, 64), dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    return (weight * pattern.keep(weight.abs())).to(dtype)


def through_a_file(state):
    """Packed, written, read and unpacked; and the bytes of the tensors in the file."""
    tensors, metadata = pack(state)
    again = load(save(tensors, metadata))
    return unpack(again, metadata), sum(t.numel() * t.element_size() for t in again.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 8), NM(1, 16), NM(7, 32)], ids=str)
def test_groups(pattern, dtype):
    weight = sparse(pattern, dtype=dtype)
    state, size = through_a_file({"w": weight})
    assert state["w"].dtype == dtype and torch.equal(state["w"], weight)
    each = 8 * weight.element_size() + math.ceil(math.log2(pattern.m))
    assert 8 * size <= weight.numel() * pattern.n / pattern.m * each
    if (pattern, dtype) == (NM(2, 4), torch.float16):
        assert size == 9 / 16 * weight.numel() * 2


def test_groups_along_the_other_dimension():
    weight = sparse(NM(2, 4)).t().contiguous()
    tensors, metadata = pack({"w": weight})
    assert json.loads(metadata["packed"])["w"] == {"shape": [64, 24], "pattern": "2:4", "dim": 0}
    assert torch.equal(unpack(tensors, metadata)["w"], weight)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(7, 13), (4, 3, 2, 5)])
def test_any_other_sparsity(shape, share):
    torch.manual_seed(1)
    weight = torch.randn(shape) * (torch.rand(shape) >= share)
    state, size = through_a_file({"w": weight})
    assert torch.equal(state["w"], weight)
    assert size <= min(4 * weight.numel(), 4 * int(weight.count_nonzero()) + -(-weight.numel() // 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [Block(4, 4), Block(16, 16), Block(4, 1), Block(1, 4)], ids=str)
def test_blocks_take_a_bit_each(block, dtype):
    torch.manual_seed(2)
    kept = torch.rand(64 // block.rows, 128 // block.columns) < 0.2
    weight = ((torch.rand(64, 128) + 0.5) * block.expand(kept)).to(dtype)
    weight[0, 0] = -0.0
    tensors, metadata = pack({"w": weight})
    assert json.loads(metadata["packed"])["w"] == {"shape": [64, 128], "pattern": str(block)}
    state, size = through_a_file({"w": weight})
    assert state["w"].dtype == dtype and torch.equal(state["w"], weight)
    assert size == int(block.reduce(weight.float()).count_nonzero()) * block.numel * dtype.itemsize + kept.numel() // 8
    for damaged in (
        {**tensors, "w.values": tensors["w.values"][1:]},
        {**tensors, "w.bitmask": tensors["w.bitmask"][1:]},
    ):
        with pytest.raises(ValueError, match="'w' is damaged"):
            unpack(damaged, metadata)


def test_values_that_are_not_numbers_and_groups_with_fewer_than_n():
    weight = torch.zeros(4, 8)
    weight[0, 0], weight[0, 5], weight[1, 1:3], weight[3, 7] = math.nan, -math.inf, 2.0, 1e-45
    weight[2, 2] = -0.0
    state, _ = through_a_file({"w": weight})
    plain = torch.where(weight == 0, 0.0, weight)  # -0 is a zero
    assert torch.equal(state["w"].view(torch.int32), plain.view(torch.int32))


def test_what_is_dense_stays_as_it_is():
    state = {"a": torch.randn(3, 8), "bias": torch.zeros(9), "count": torch.zeros(4, 4, dtype=torch.int64)}
    state["tied"] = state["a"]
    tensors, metadata = pack(state)
    assert tensors.keys() == state.keys() and json.loads(metadata["packed"]) == {}
    assert all(torch.equal(unpack(tensors, metadata)[name], tensor) for name, tensor in state.items())
    assert unpack(tensors, None).keys() == state.keys()


@pytest.mark.parametrize("kind", ["groups", "mask"])
def test_damage_is_named(kind):
    weight = sparse(NM(2, 4)) if kind == "groups" else torch.eye(9)
    tensors, metadata = pack({"w": weight})
    where = "w.indices" if kind == "groups" else "w.bitmask"
    shape = json.dumps({"w": {**json.loads(metadata["packed"])["w"], "shape": [99, 96]}})
    damaged = [
        ({name: t for name, t in tensors.items() if name != where}, metadata),
        ({name: t for name, t in tensors.items() if name != "w.values"}, metadata),
        ({**tensors, "w.values": tensors["w.values"].view(-1)[:-3]}, metadata),
        ({**tensors, where: tensors[where][:-1]}, metadata),
        (tensors, {"packed": shape}),
        (tensors, {"packed": '{"w": {"shape": [3]}}'}),
    ]
    for parts, told in damaged:
        with pytest.raises(ValueError, match="the packed weight 'w' is damaged"):
            unpack(parts, told)
    with pytest.raises(ValueError, match="damaged"):
        unpack(tensors, {"packed": "[3"})


def test_other_values_are_noticed():
    tensors, metadata = pack({"w": sparse(NM(2, 4)), "bias": torch.ones(3)})
    for name in ("w.values", "bias"):
        with pytest.raises(ValueError, match="digest"):
            unpack({**tensors, name: tensors[name] * 2}, metadata)
    older = {key: text for key, text in metadata.items() if key != "packed_digest"}
    assert torch.equal(unpack(tensors, older)["w"], sparse(NM(2, 4)))
    for damaged in (older | {"packed_digesu": ""}, {"format": "pt", "packed_digest": metadata["packed_digest"]}):
        with pytest.raises(ValueError, match="description"):
            unpack(tensors, damaged)


def test_two_values_in_one_place_are_noticed():
    tensors, metadata = pack({"w": sparse(NM(2, 4))})
    tensors["w.indices"] = torch.zeros_like(tensors["w.indices"])
    with pytest.raises(ValueError, match="the packed weight 'w' is damaged"):
        unpack(tensors, {"packed": metadata["packed"]})


def test_patterns_of_zeros():
    assert patterns_of([sparse(NM(2, 4))]) == [NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32)]
    assert patterns_of([sparse(NM(2, 4)), sparse(NM(1, 4))])[0] == NM(2, 4)
    assert patterns_of([torch.randn(4, 32)]) == [] and patterns_of([torch.zeros(2, 6)]) == []
    assert patterns_of([torch.zeros(2, 4)]) == [NM(1, 4)]
