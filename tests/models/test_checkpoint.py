"""Weights of public and own files: wrappers, prefixes, formats, ties, position tables, and what is refused."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.export import save_weights
from models.checkpoint import WRAPPERS, interpolate_positions, load_weights, read_weights
from models.parts.clip_vision import CLIPVisionTransformer, VisionConfig
from models.xvlm import model as xvlm
from tests.conftest import CONFIG, SMALL

KEYS = json.loads(Path("tests/data/checkpoints/XVLMPretrain.json").read_text())
WORDS, LOGITS = "text_encoder.bert.embeddings.word_embeddings.weight", "text_encoder.cls.predictions.decoder.weight"


class Code:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.out.weight = self.embed.weight
        self.register_buffer("position_ids", torch.arange(3))


@pytest.fixture(scope="module")
def state():
    return {"embed.weight": torch.randn(5, 4), "out.weight": None, "out.bias": torch.randn(5)}


@pytest.fixture
def tied(state):
    """State dict of `Tied`, its tied weight under both names."""
    return {name: state["embed.weight"] if t is None else t for name, t in state.items()}


def refusal(model, path, **options):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_weights(model, path, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    return text.removeprefix(f"{path}: ")


# Formats, wrappers and prefixes


@pytest.mark.parametrize("wrapper", [None, *WRAPPERS, "model+model_state"])
@pytest.mark.parametrize("kind", ["zip", "before torch 1.6"])
def test_wrapped_pickles(tmp_path, tied, wrapper, kind):
    content = tied
    for key in reversed(wrapper.split("+") if wrapper else []):
        content = {key: content, "epoch": 3, "config": {"lr": 0.1, "betas": (0.9, 0.98)}, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=kind == "zip")
    torch.testing.assert_close(read_weights(tmp_path / "w.pth"), tied, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_safetensors_by_content_not_by_name(tmp_path, tied, name):
    save_file({key: t.clone() for key, t in tied.items()}, tmp_path / name)
    torch.testing.assert_close(read_weights(tmp_path / name), tied, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_stripped(tmp_path, tied, prefix):
    torch.save({"model": {prefix + name: t for name, t in tied.items()}}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == set(tied)


def test_own_files_come_back(tmp_path, small_xvlm):
    path = save_weights(small_xvlm, tmp_path / "w.safetensors")
    torch.testing.assert_close(xvlm.build(CONFIG, path).state_dict(), small_xvlm.state_dict(), rtol=0, atol=0)


def test_half_precision_is_widened(tmp_path, small_xvlm):
    model = xvlm.build(CONFIG, save_weights(small_xvlm, tmp_path / "w.safetensors", torch.float16))
    expected = {name: t.half().float() if t.is_floating_point() else t for name, t in small_xvlm.state_dict().items()}
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


# Tied tensors, names that may differ


@pytest.mark.parametrize("left_out", ["embed.weight", "out.weight", None])
def test_a_tied_tensor_under_any_of_its_names(tmp_path, tied, left_out):
    torch.save({name: t for name, t in tied.items() if name != left_out}, tmp_path / "w.pth")
    model = Tied()
    load_weights(model, tmp_path / "w.pth", ignored=("*position_ids",))
    assert torch.equal(model.embed.weight, tied["embed.weight"]) and model.out.weight is model.embed.weight


def test_tied_tensors_that_differ_are_refused(tmp_path, tied):
    torch.save(tied | {"out.weight": tied["embed.weight"] + 1}, tmp_path / "w.pth")
    told = refusal(Tied(), tmp_path / "w.pth", ignored=("position_ids",))
    assert told == "weights of another model: 1 different though tied: out.weight"


@pytest.mark.parametrize("change", [{"position_ids": torch.zeros(9, 9)}, {}])
def test_ignored_names_may_be_missing_or_of_any_shape(tmp_path, tied, change):
    torch.save(tied | change, tmp_path / "w.pth")
    model = Tied()
    load_weights(model, tmp_path / "w.pth", ignored=("position_ids",))
    assert torch.equal(model.position_ids, torch.arange(3))


# What is refused


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    content = {"embed.weight": torch.zeros(5, 3), "position_ids": torch.arange(3), "a": torch.zeros(1)}
    torch.save(content, tmp_path / "w.pth")
    assert refusal(Tied(), tmp_path / "w.pth") == (
        "weights of another model: 1 misshapen: embed.weight (5, 3) (expected (5, 4)); 1 missing: out.bias; "
        "1 unexpected: a"
    )


def test_only_the_first_names_are_shown(tmp_path, tied):
    torch.save(tied | {f"x{i}": torch.zeros(1) for i in range(9)}, tmp_path / "w.pth")
    assert refusal(Tied(), tmp_path / "w.pth").endswith("9 unexpected: x0, x1, x2 and 6 more")


def damage(path):
    """Writes files that are no weights, name -> content."""
    torch.save({"a": torch.zeros(1000)}, path / "whole")
    save_file({"a": torch.zeros(1000)}, path / "whole.safetensors")
    whole, safe = (path / "whole").read_bytes(), (path / "whole.safetensors").read_bytes()
    torch.save({"a": torch.zeros(1000)}, path / "old", _use_new_zipfile_serialization=False)
    old = (path / "old").read_bytes()
    return {
        "empty.pth": b"",
        "junk.pth": b"hello world" * 50,
        "junk.safetensors": b"\x10" + bytes(7) + b"{" + b"x" * 50,
        "page.html": b"<!DOCTYPE html><html>Quota exceeded</html>",
        "cut.pth": whole[: len(whole) // 2],
        "cut_old.pth": old[: len(old) // 2],
        "cut.safetensors": safe[: len(safe) // 2],
        "head.safetensors": safe[:20],
    }


def test_damaged_files_are_named(tmp_path):
    for name, content in damage(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        told = refusal(Tied(), tmp_path / name)
        assert told == "not a readable weights file: it is damaged, or neither safetensors nor a pickle of tensors"


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "bare"])
def test_code_in_a_pickle_is_not_executed(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"a": torch.zeros(2)}, "config": Code()}
    path = Path("code.pth")
    if kind == "bare":
        path.write_bytes(pickle.dumps(Code(), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    told = refusal(Tied(), path)
    assert told.startswith("not a readable weights file: it ")
    assert kind == "bare" or f"it holds {os.system.__module__}.system, and only tensors" in told
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": 3}, {"a": torch.zeros(1), "b": 2}, torch.zeros(3)])
def test_a_pickle_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert refusal(Tied(), tmp_path / "w.pth").startswith("expected names with tensors, bare or under 'model'")


def test_a_missing_file_is_named(tmp_path):
    assert refusal(Tied(), tmp_path / "nothing.pth") == "weights file not found"
    assert refusal(Tied(), tmp_path) == "weights file not found"


# Position tables


def test_interpolation_keeps_the_class_token_and_is_the_identity_at_the_same_size():
    table = torch.randn(1 + 9, 6)
    larger = interpolate_positions(table, 1 + 16)
    assert larger.shape == (17, 6) and torch.equal(larger[0], table[0])
    assert torch.equal(interpolate_positions(table, 10), table)


def test_interpolation_is_bicubic_over_rows_and_columns():
    """A plane over the grid stays one, away from the border: rows and columns are not mixed up."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.cat([torch.zeros(1, 2), torch.stack([rows, columns], -1).reshape(64, 2)])
    grid = interpolate_positions(table, 1 + 16 * 16)[1:].reshape(16, 16, 2)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(grid[4:-4, 4:-4, 0], expected[4:-4, None].expand(8, 8), rtol=0, atol=0.05)
    torch.testing.assert_close(grid[4:-4, 4:-4, 1], expected[None, 4:-4].expand(8, 8), rtol=0, atol=0.05)


@pytest.mark.parametrize("rows", [1, 9, 11, 18])
def test_a_table_without_a_square_grid_is_refused(rows):
    with pytest.raises(ValueError, match="class token and a square grid"):
        interpolate_positions(torch.zeros(rows, 4), 17)


def vision(side):
    config = VisionConfig(image_size=side, patch_size=16, width=8, layers=1, heads=1, mlp_width=8, local_attn_depth=1)
    return CLIPVisionTransformer(config)


def test_images_of_64_pixels_with_weights_for_48(tmp_path):
    small, large = vision(48), vision(64)
    torch.save(small.state_dict(), tmp_path / "w.pth")
    load_weights(large, tmp_path / "w.pth", positions=("pos_embed.weight",), ignored=("position_ids",))
    assert torch.equal(large.pos_embed.weight, interpolate_positions(small.pos_embed.weight.data, 17))
    again = vision(48)
    load_weights(again, tmp_path / "w.pth", positions=("pos_embed.weight",))
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("table", [torch.zeros(1, 10, 8), torch.zeros(10, 9), torch.zeros(12, 8), torch.zeros(1, 8)])
def test_a_table_that_cannot_be_interpolated_is_misshapen(tmp_path, table):
    torch.save(vision(48).state_dict() | {"pos_embed.weight": table}, tmp_path / "w.pth")
    told = refusal(vision(64), tmp_path / "w.pth", positions=("pos_embed.weight",), ignored=("position_ids",))
    assert told.startswith(f"weights of another model: 1 misshapen: pos_embed.weight {tuple(table.shape)}")


# The public XVLM


def test_the_known_answer_loads(small_xvlm):
    expected = read_weights(SMALL / "state_dict.safetensors")
    for name, tensor in small_xvlm.state_dict().items():
        if name in expected:
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.fixture
def public_file(tmp_path):
    """A sparse file with the keys and shapes of the public checkpoint: all zeros, it takes no room on the disk."""
    header, offset = {}, 0
    for name, shape in KEYS.items():
        kind, size = ("I64", 8) if name.endswith("position_ids") else ("F32", 4)
        end = offset + size * torch.Size(shape).numel()
        header[f"module.{name}"] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path = tmp_path / "4m-xvlm-vit-bert.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.script
def test_the_full_size_file_fits_the_full_size_model(public_file):
    """On the meta device, where copying costs nothing: every name and shape is checked."""
    with torch.device("meta"):
        model = xvlm.XVLM(xvlm.Config())
    load_weights(model, public_file, positions=xvlm.POSITIONS, ignored=xvlm.HARMLESS)


@pytest.mark.script
def test_the_full_size_file_does_not_fit_the_small_model(public_file):
    model = xvlm.XVLM(CONFIG)
    told = refusal(model, public_file, positions=xvlm.POSITIONS, ignored=xvlm.HARMLESS)
    assert "misshapen: vision_encoder.class_embedding (768,) (expected (64,))" in told and "unexpected" in told


def test_either_name_of_the_word_embeddings_is_enough(tmp_path, small_xvlm):
    state = small_xvlm.state_dict()
    for left_out in (WORDS, LOGITS, "vision_encoder.position_ids"):
        torch.save({"model": {name: t for name, t in state.items() if name != left_out}}, tmp_path / "w.pth")
        torch.testing.assert_close(xvlm.build(CONFIG, tmp_path / "w.pth").state_dict(), state, rtol=0, atol=0)
