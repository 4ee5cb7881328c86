"""Evaluations of models whose parts are computed by files, and the zeros of int8 files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.deployment.by_files import computed_by, methods_of
from engine.deployment.onnx_files import OnnxModel, quantise, write_onnx
from models.parts.graphs import Graph


class File:
    """A file of ONNX that gives a constant for each sample."""

    def __init__(self, outputs: int):
        self.outputs = outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        first = next(iter(inputs.values()))
        assert all(len(each) == len(first) for each in inputs.values())
        return [torch.full((len(first), i + 2), 7.0) for i in range(self.outputs)]


class Pair(nn.Module):
    def encode_image(self, image: Tensor) -> Any:
        return "its own"


def test_methods_are_those_of_the_files_inside_the_block() -> None:
    files: Any = {"vision": File(2), "text": File(2), "match": File(1)}
    model, images, ids = Pair(), torch.zeros(3, 3, 4, 4), torch.ones(5, 6)
    with pytest.raises(RuntimeError, match="inside"), computed_by(model, methods_of(files)):
        tokens, feature = model.encode_image(images)
        assert tokens.shape == (3, 2) and feature.shape == (3, 3)
        assert model.encode_text(ids, ids)[0].shape == (5, 2)  # type: ignore[operator]
        one = model.project_image(torch.zeros(1, 9, 4))  # type: ignore[operator]
        logits = model.match(torch.zeros(5, 6, 8), ids, one)  # type: ignore[operator]
        assert torch.equal(logits, torch.full((5, 2), 7.0))
        raise RuntimeError("inside")
    assert model.encode_image(images) == "its own" and not hasattr(model, "match")


def test_parts_that_no_evaluation_runs_by_itself() -> None:
    step: Any = {"vision": File(1), "step": File(1)}
    assert methods_of(step) == {}
    classifier: Any = {"classifier": File(1)}
    assert methods_of(classifier)["classify"](torch.zeros(4, 3, 8, 8)).shape == (4, 2)


@pytest.mark.script
def test_zeros_of_an_int8_file_are_zeros(tmp_path: Path) -> None:
    """Each weight is the nearest on the grid of its output channel, and a pruned one exactly zero."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    kept = {}
    for index in (0, 2):
        weight = model[index].weight.data
        kept[weight.shape[::-1]] = weight.mul_(torch.rand(weight.shape) < 0.3).t().clone()
    model[2].weight.data[3] = 0  # a channel of nothing
    kept[32, 8][:, 3] = 0
    graph = Graph("classifier", model, {"input": torch.randn(2, 16)}, ("logits",))
    path = quantise(write_onnx(graph, tmp_path / "a.onnx"), tmp_path / "a.int8.onnx")
    tensors = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in onnx.load(path).graph.initializer}
    stored = {name.removesuffix("_quantized"): t for name, t in tensors.items() if name.endswith("_quantized")}
    assert len(stored) == 2
    for name, integers in stored.items():
        scale, weight = tensors[f"{name}_scale"], kept[tuple(integers.shape)]
        assert integers.dtype == torch.int8 and not tensors[f"{name}_zero_point"].any()
        assert not integers[weight == 0].any()
        assert ((integers * scale - weight).abs() <= 0.5 * scale + 1e-6).all()
    assert OnnxModel(path)({"input": torch.randn(5, 16)})[0].shape == (5, 8)
