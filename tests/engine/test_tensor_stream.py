"""Tensors streamed to a file that any safetensors reader reads."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from engine.tensor_stream import stream_tensors


def test_safetensors_reads_them_in_float32(tmp_path):
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a.weight": torch.randn(7, 2, dtype=torch.float64),
        "t": torch.randn(4, 6).t(),
        "half": torch.randn(2, 2).bfloat16(),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    stream_tensors(tmp_path / "s.safetensors", shapes, tensors.items())
    loaded = load_file(tmp_path / "s.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], tensor.float())
    assert np.array_equal(load_numpy(tmp_path / "s.safetensors")["t"], tensors["t"].numpy())


def test_tensors_are_taken_one_at_a_time(tmp_path):
    held = []

    def tensors():
        for name in "abc":
            assert len(held) == ord(name) - ord("a")
            held.append(name)
            yield name, torch.full((2,), ord(name))

    stream_tensors(tmp_path / "s.safetensors", dict.fromkeys("abc", (2,)), tensors())
    assert load_file(tmp_path / "s.safetensors")["c"].tolist() == [99.0, 99.0]


@pytest.mark.parametrize(
    "given",
    [
        [("a", torch.zeros(2)), ("x", torch.zeros(3))],
        [("a", torch.zeros(2)), ("b", torch.zeros(4))],
        [("a", torch.zeros(2))],
    ],
)
def test_others_than_announced_leave_nothing(tmp_path, given):
    with pytest.raises(ValueError):
        stream_tensors(tmp_path / "s.safetensors", {"a": (2,), "b": (3,)}, given)
    assert not list(tmp_path.iterdir())
