"""The conversion of DINOv2's weights from an ONNX graph, and what is measured of them."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.dinov2 import PATCH, converted, cosines, onnx_bytes, photographs, resampled
from sparsity.errors import UserError

WIDTH, INNER, GRID = 6, 8, 3
LAYER = "backbone.encoder.layer.0"
WHAT = ("weight", "bias")


def graph_of(onnx, held, products):
    """An ONNX graph with these initializers, and a MatMul and an Add for each (name of a matrix, name of its bias)."""
    nodes = []
    for i, (matrix, bias) in enumerate(products):
        nodes.append(onnx.helper.make_node("MatMul", [f"x{i}", matrix], [f"y{i}"]))
        parts = [bias, f"y{i}"] if i % 2 else [f"y{i}", bias]  # either order
        nodes.append(onnx.helper.make_node("Add", parts, [f"z{i}"]))
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in held.items()]
    return onnx.helper.make_graph(nodes, "g", [], [], initializers)


def test_names_and_shapes_of_timm():
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    sizes = {f"attention.attention.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (WIDTH, WIDTH), "mlp.fc1": (WIDTH, INNER), "mlp.fc2": (INNER, WIDTH)}
    held = {f"{LAYER}.{name}.bias": drawn(size[1]) for name, size in sizes.items()}
    held |= {f"onnx::MatMul_{i}": drawn(*size) for i, size in enumerate(sizes.values())}
    held |= {f"{LAYER}.layer_scale1.lambda1": drawn(WIDTH), "backbone.layernorm.weight": drawn(WIDTH)}
    held |= {"backbone.embeddings.patch_embeddings.projection.weight": drawn(WIDTH, 3, 2, 2)}
    held |= {"backbone.embeddings.cls_token": drawn(1, 1, WIDTH), "decoder.final_conv.bias": drawn(1)}
    held |= {"onnx::Reshape_9": drawn(1, GRID**2, WIDTH), "onnx::Concat_8": drawn(1, 1, WIDTH)}
    products = [(f"onnx::MatMul_{i}", f"{LAYER}.{name}.bias") for i, name in enumerate(sizes)]
    state = converted(graph_of(onnx, held, products))
    assert {*state} == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "blocks.0.ls1.gamma"),
        *(f"blocks.0.{layer}.{what}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for what in WHAT),
    }
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], torch.from_numpy(held["onnx::MatMul_4"].T))
    query, key, value = (held[f"onnx::MatMul_{i}"].T for i in range(3))
    assert np.array_equal(state["blocks.0.attn.qkv.weight"], np.concatenate([query, key, value]))
    assert np.array_equal(state["blocks.0.attn.qkv.bias"][:WIDTH], held[f"{LAYER}.attention.attention.query.bias"])
    assert np.array_equal(state["pos_embed"][0, :1], held["onnx::Concat_8"][0])
    assert np.array_equal(state["pos_embed"][0, 1:], held["onnx::Reshape_9"][0])


def test_positions_keep_their_places():
    table = torch.randn(1, 1 + 25, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resampled(table, 5 * PATCH), table, atol=1e-6)
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    plane = torch.stack([rows, columns], dim=-1).reshape(1, 25, 2)
    small = resampled(torch.cat([torch.zeros(1, 1, 2), plane], dim=1), 3 * PATCH)[0, 1:].reshape(3, 3, 2)
    assert (small[:, :, 0].diff(dim=0) > 0).all() and (small[:, :, 1].diff(dim=1) > 0).all()
    assert torch.allclose(small[1, 1], torch.tensor([2.0, 2.0]), atol=1e-5)


def test_cosines_are_means_over_images():
    one, other = torch.randn(2, 3, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    token, patches = cosines(one, other)
    told = [
        [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(x, y, strict=True)]
        for x, y in zip(one, other, strict=True)
    ]
    assert token == pytest.approx(np.mean([t[0] for t in told]), abs=1e-6)
    assert patches == pytest.approx(np.mean([t[1:] for t in told]), abs=1e-6)
    assert cosines(one, 3 * one) == pytest.approx((1.0, 1.0), abs=1e-6)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def test_photographs_of_folders_and_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("coffee.png", "logo.png", "china.png", "chelsea.py"):
            wheel.writestr(f"package/data/{name}", png("red"))
    (tmp_path / "own").mkdir()
    for name in ("mine.png", "other.png", "notes.txt"):
        (tmp_path / "own" / name).write_bytes(png("blue"))
    assert list(photographs([tmp_path / "own", tmp_path / "a.whl"])) == ["china", "coffee", "mine", "other"]
    with pytest.raises(UserError, match="2 images found, at least 4 are needed"):
        photographs([tmp_path / "own"])


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file; scripts/dinov2.sh downloads it"):
        onnx_bytes(tmp_path / "absent.whl")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a.txt", "")
    with pytest.raises(UserError, match="expected one ONNX file in the wheel, found 0"):
        onnx_bytes(tmp_path / "a.whl")
