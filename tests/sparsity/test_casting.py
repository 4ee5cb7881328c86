"""A cast of weights says what it loses, and loses nothing unless it is told to."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.casting import FLOATS, cast, losses
from sparsity.errors import UserError
from sparsity.packing import pack, unpack

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
ALL = ("vanished", "overflowed")
QUICK = settings(max_examples=200, deadline=None)


@QUICK
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(FLOATS),
)
@pytest.mark.script
def test_what_is_counted_is_what_is_lost(values, source, target):
    weight = torch.tensor(values, dtype=source)
    narrow = weight.to(target)
    vanished = sum(before != 0 and after == 0 for before, after in zip(values, narrow.tolist(), strict=True))
    overflowed = sum(
        math.isfinite(before) and math.isinf(after) for before, after in zip(values, narrow.tolist(), strict=True)
    )
    expected = {"vanished": vanished, "overflowed": overflowed}
    found = {loss.kind: loss.values for loss in losses("w", weight, narrow)}
    assert found == {kind: count for kind, count in expected.items() if count}
    if not found:
        again = cast({"w": weight}, target)["w"]
        assert again.dtype == target and torch.equal(again.isfinite(), weight.isfinite())
        assert torch.equal(again != 0, weight != 0)
        return
    with pytest.raises(UserError, match=f"{next(iter(found.values()))} values (vanish|overflow) .* in w"):
        cast({"w": weight}, target)
    torch.testing.assert_close(cast({"w": weight}, target, allowed=ALL)["w"], narrow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (65520.0, torch.float16, "1 values overflow (become infinite) as float16, in a.weight"),
        (-3.4e38, torch.bfloat16, "1 values overflow (become infinite) as bfloat16"),
        (2e-8, torch.float16, "1 values vanish (become 0) as float16"),
        (1e-45, torch.bfloat16, "1 values vanish (become 0) as bfloat16"),
    ],
)
def test_the_ends_of_each_type(value, dtype, told):
    state = {"a.weight": torch.tensor([1.0, value, 0.0, math.inf, math.nan])}
    with pytest.raises(UserError) as error:
        cast(state, dtype, way_out="say so")
    assert str(error.value).startswith(told) and str(error.value).endswith("; say so")
    kind, other = ALL if "vanish" in told else ALL[::-1]
    with pytest.raises(UserError):
        cast(state, dtype, allowed=(other,))
    assert cast(state, dtype, allowed=(kind,))["a.weight"].dtype == dtype


@pytest.mark.parametrize("value", [65504.0, 65519.0, 6e-8, 3.1e-8, 1e-6])
def test_rounding_is_no_loss(value):
    """Subnormal numbers of the narrow type, too."""
    assert cast({"w": torch.tensor([value])}, torch.float16)["w"].isfinite().all()


def test_what_is_allowed_is_logged(caplog):
    state = {f"w{i}": torch.tensor([1e-9, 1e-9]) for i in range(5)}
    with caplog.at_level(logging.WARNING):
        cast(state, torch.float16, allowed=("vanished",))
    assert "10 values vanish (become 0) as float16, in w0, w1, w2 ..." in caplog.text


def test_each_to_its_own():
    state = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2).to(torch.float8_e5m2)}
    found = cast(state, {"a": torch.bfloat16, "c": torch.float16})
    assert [tensor.dtype for tensor in found.values()] == [torch.bfloat16, torch.float32, torch.float8_e5m2]
    assert found["b"] is state["b"]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_carried(dtype, caplog):
    state = {"w": torch.randn(8, 8).to(dtype), "scale": torch.ones(1), "steps": torch.tensor([3])}
    with caplog.at_level(logging.WARNING):
        found = cast(state, torch.bfloat16)
    assert found["w"] is state["w"] and found["steps"] is state["steps"] and found["scale"].dtype == torch.bfloat16
    assert f"1 tensors of {str(dtype)[6:]} stay as they are, for example w" in caplog.text
    tensors, metadata = pack(found)
    again = unpack(tensors, metadata)["w"]
    assert again.dtype == dtype and torch.equal(again.view(torch.uint8), state["w"].view(torch.uint8))
