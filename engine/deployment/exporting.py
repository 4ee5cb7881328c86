"""The steps of `export.py`: each writes its files and returns a line on them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.deployment.onnx_files import Graph, OnnxModel, largest_error, quantise, trtexec, write_onnx
from engine.deployment.real_inputs import real_inputs
from sparsity.errors import UserError

TOLERANCE = 1e-4  # of an output, relative to its largest value where that is above 1
TRAP = """The commands that build a TensorRT engine and time it, with dense kernels and, where they are faster, with
those of 2:4, whose zeros are in the ONNX file (--sparsity=force would prune by itself). The log of the second says how
many layers are eligible for sparse kernels and how many got one. A product that a plugin computes (GEMM or attention
plugins, as of TensorRT-LLM) is not seen by this and stays dense: leave plugins out, or the zeros gain nothing. --fp16
or --bf16 is needed: there are no sparse kernels in float32.
"""


def export_onnx(
    graphs: Sequence[Graph], folder: Path, bundled: Mapping[str, Tensor], int8: bool
) -> Iterator[tuple[str, str]]:
    """Write the ONNX files of all parts, and return (file, what was found). UserError where an output differs.

    bundled: see `engine.deployment.real_inputs.bundled_inputs`. int8: write int8 files beside them.
    """
    commands = [TRAP]
    for graph, real in zip(graphs, real_inputs(graphs, bundled), strict=True):
        path = write_onnx(graph, folder / f"{graph.name}.onnx")
        yield path.name, _checked(graph, path, real)
        commands += [f"# {path.name}\n", *(f"{line}\n" for line in trtexec(path, graph))]
        if int8:
            target = quantise(path, path.with_suffix(".int8.onnx"))
            error = max(error for _, error, _ in _errors(graph, OnnxModel(target), real))
            yield target.name, f"{target.stat().st_size / 1e6:.2f} MB, largest error {error:.1e}: measure its quality"
    target = folder / "tensorrt.txt"
    target.write_text("\n".join(commands))
    yield target.name, "the commands that build TensorRT engines"


def _checked(graph: Graph, path: Path, real: Mapping[str, Tensor]) -> str:
    found = list(_errors(graph, OnnxModel(path), real))
    for what, error, size in found:
        if not error <= TOLERANCE * max(1.0, size):
            raise UserError(f"{path}: on {what} inputs the outputs differ by {error:.1e} from the model's")
    told = ", ".join(f"{what} {error:.1e}" for what, error, _ in found)
    return f"{path.stat().st_size / 1e6:.2f} MB, largest error: {told}"


def _errors(graph: Graph, model: OnnxModel, real: Mapping[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """Yield (which inputs, largest error, largest output), for batches of several sizes and texts of two lengths. real:
    inputs of the part; empty where there are none.
    """
    trials = {"random": [graph.random(1, 1), graph.random(3, 2)]}
    if graph.lengths:
        trials["random"].append(graph.random(2, 3, length=3))
    if real:
        trials["bundled"] = [dict(real)]
    for what, batches in trials.items():
        with torch.no_grad():
            sizes = [float(torch.as_tensor(_first(graph, inputs)).abs().max()) for inputs in batches]
        yield what, max(largest_error(graph, model, inputs) for inputs in batches), max(sizes)


def _first(graph: Graph, inputs: Mapping[str, Tensor]) -> Tensor:
    found = graph.module(*inputs.values())
    return found[0] if isinstance(found, tuple) else found
