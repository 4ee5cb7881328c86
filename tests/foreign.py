"""Programs that do not know this project, which run what it exports."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.deployment import onnx_files
from tests.processes import PATIENCE

FOREIGN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
{body}
assert not {{"models", "sparsity", "engine"}} & set(sys.modules)
"""


def foreign(body: str, *arguments: object) -> str:
    """Run a program in another process, from a folder in which nothing of this project is found."""
    code = [sys.executable, "-I", "-c", FOREIGN.format(body=body), *map(str, arguments)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=PATIENCE, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN_ONNX = """
import numpy, onnxruntime
for path in sys.argv[2:]:
    session = onnxruntime.InferenceSession(path)
    given = load_file(sys.argv[1] + "/" + Path(path).stem + ".safetensors")
    inputs = {each.name: given[each.name].numpy() for each in session.get_inputs()}
    for each, found in zip(session.get_outputs(), session.run(None, inputs)):
        error = numpy.abs(found - given["out." + each.name].numpy()).max()
        assert error < 1e-4, (path, each.name, error)
"""


def expected(folder: Path, graphs: Sequence[Any], batch: int = 3) -> list[str]:
    """Write inputs of each part with the outputs of the model, as another process reads them."""
    for graph in graphs:
        inputs = graph.random(batch, seed=5)
        with torch.no_grad():
            found = graph.module.eval()(*inputs.values())
        found = found if isinstance(found, tuple) else (found,)
        outputs = {f"out.{name}": each.contiguous() for name, each in zip(graph.outputs, found, strict=True)}
        save_file(inputs | outputs, folder / f"{graph.name}.safetensors")
    return [graph.name for graph in graphs]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the parts of models that export.py writes as ONNX from here on."""
    kept, original = [], onnx_files.write_onnx

    def write(graph: Any, path: Path) -> Path:
        kept.append(graph)
        return original(graph, path)

    monkeypatch.setattr("engine.deployment.exporting.write_onnx", write)
    return kept
