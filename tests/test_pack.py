"""pack.py: what is quantised is carried, and what --dtype would lose is said and refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import pack
from engine.export import save_weights
from models.checkpoint import read_weights
from sparsity.errors import UserError


@pytest.fixture
def checkpoint(tmp_path):
    def write(**tensors):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
        return [str(tmp_path / "a.safetensors"), str(tmp_path / "p.safetensors")]

    return write


@pytest.mark.parametrize("options", [[], ["--dtype", "float16"], ["--unpack"]])
def test_float8_is_as_it_was(checkpoint, options):
    weight = torch.randn(16, 16).to(torch.float8_e4m3fn)
    given = checkpoint(w=weight, b=torch.ones(3))
    pack.main([*given, *options])
    found = read_weights(given[1])
    assert found["w"].dtype == weight.dtype and torch.equal(found["w"].view(torch.uint8), weight.view(torch.uint8))
    assert found["b"].dtype == (torch.float16 if "float16" in options else torch.float32)


def test_what_a_type_cannot_hold_is_refused_unless_it_is_allowed(checkpoint, tmp_path):
    given = checkpoint(large=torch.tensor([1e5, 1.0]), small=torch.tensor([[1e-9, 0.0, 1.0, 0.0]]))
    half = [*given, "--dtype", "float16"]
    with pytest.raises(UserError, match=r"a.safetensors: 1 values vanish .* in small: .*--allow_loss vanished or all"):
        pack.main(half)
    with pytest.raises(UserError, match=r"a.safetensors: 1 values overflow .* in large"):
        pack.main([*half, "--allow_loss", "vanished"])
    assert not (tmp_path / "p.safetensors").exists()
    pack.main([*half, "--allow_loss", "all"])
    found = read_weights(given[1])
    assert found["large"].tolist() == [float("inf"), 1.0] and found["small"].tolist() == [[0.0, 0.0, 1.0, 0.0]]
    pack.main([*given, "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="--allow_loss is for --dtype"):
        pack.main([*given, "--allow_loss", "all"])


def test_saved_weights_keep_their_types_unless_one_is_given(tmp_path):
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    model.register_buffer("deep", torch.tensor([1e300], dtype=torch.float64))
    path = save_weights(model, tmp_path / "w.safetensors")
    assert {str(t.dtype) for t in load_file(path).values()} == {"torch.bfloat16", "torch.float64"}
    with pytest.raises(UserError, match=r"w.safetensors: 1 values overflow .* as float32, in deep"):
        save_weights(model, path, torch.float32)
    save_weights(model, path, torch.float32, allowed=("overflowed",))
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}
