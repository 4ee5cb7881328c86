"""ONNX: models written by torch.onnx.export, checked with onnxruntime, made int8, and what TensorRT needs for them.

onnx, onnxscript and onnxruntime are optional packages: `engine.deployment.options.check_packages` says in one line
which of them is missing.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.files import replacing

OPSET = 20


class Graph(Protocol):
    """Declare what `models.parts.graphs.Graph` has, of which this module reads these."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def lengths(self) -> tuple[str, ...]: ...
    @property
    def longest(self) -> int: ...
    def random(self, batch: int, seed: int) -> dict[str, Tensor]: ...


def write_onnx(graph: Graph, path: Path) -> Path:
    """Write a part of a model as ONNX, in float32 and one file, with a batch (and lengths) of any size."""
    module = graph.module.eval()
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=_dynamic(graph),
            dynamo=True,
            opset_version=OPSET,
        )
    assert program is not None, "with dynamo=True there is a program"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        program.save(str(temporary), external_data=_bytes(module) > 1 << 30)
    return path


def _dynamic(graph: Graph) -> Any:
    """Return which dimensions of the arguments change, as torch.export wants them: those of *args as one tuple."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=graph.longest)
    shapes = tuple({0: batch, 1: length} if name in graph.lengths else {0: batch} for name in graph.inputs)
    code = type(graph.module).forward.__code__
    return (shapes,) if code.co_flags & 0x04 else shapes


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and warnings are left out; its errors are not."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


class OnnxModel:
    """An ONNX file in onnxruntime, on the CPU. threads: 0, as onnxruntime chooses."""

    def __init__(self, path: Path, threads: int = 0):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [each.name for each in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs for inputs by name."""
        given = {name: np.ascontiguousarray(inputs[name].numpy()) for name in self._names}
        return [torch.from_numpy(np.asarray(each)) for each in self._session.run(None, given)]


@torch.no_grad()
def largest_error(graph: Graph, model: OnnxModel, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between the outputs of an ONNX file and those of the model."""
    own = graph.module.eval()(*inputs.values())
    own = own if isinstance(own, tuple) else (own,)
    found = model(inputs)
    if [tuple(each.shape) for each in own] != [tuple(each.shape) for each in found]:
        raise UserError(f"the ONNX file of {graph.name!r} gives other shapes than the model")
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(own, found, strict=True))


def quantise(source: Path, target: Path) -> Path:
    """Write an ONNX file with weights in int8, a scale for each output channel; activations are scaled as they come.

    Symmetric: a weight that is zero stays exactly zero.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(), replacing(target) as temporary:
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
        try:
            how = {"per_channel": True, "weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]}
            quantize_dynamic(source, temporary, **how)
        finally:
            root.setLevel(level)
    return target


def trtexec(path: Path, graph: Graph, batches: Sequence[int] = (1, 8, 32)) -> list[str]:
    """Return the command lines that build a TensorRT engine of an ONNX file and time it: dense, and by 2:4 kernels."""

    def shapes(batch: int) -> str:
        sizes = {name: (batch, *example.shape[1:]) for name, example in graph.inputs.items()}
        return ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in sizes.items())

    least, usual, most = (shapes(batch) for batch in batches)
    common = f"trtexec --onnx={path.name} --fp16 --minShapes={least} --optShapes={usual} --maxShapes={most}"
    plans = {"": "", ".sparse": " --sparsity=enable"}
    return [f"{common}{flag} --saveEngine={path.stem}{kind}.plan" for kind, flag in plans.items()]
