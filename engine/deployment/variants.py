"""The variants of a model that a benchmark puts side by side: dense, with zeros, packed, by kernels, and as ONNX."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.deployment.by_files import computed_by, methods_of
from engine.deployment.measure import Variant, multiply_adds
from engine.deployment.onnx_files import Graph, OnnxModel, quantise, write_onnx
from engine.export import save_state
from sparsity.kernels.accelerate import Accelerated, accelerate
from sparsity.view import PrunableView

KINDS = ("dense", "masked", "packed", "accelerated", "onnx", "int8")
Evaluate = Callable[[], Mapping[str, float]]


def by_column(evaluate: Evaluate, columns: Mapping[str, str]) -> Evaluate:
    """Return an evaluation that gives its metrics by the columns of tables. columns: column -> metric."""

    def measured() -> dict[str, float]:
        found = evaluate()
        return {column: found[metric] for column, metric in columns.items()}

    return measured


@dataclass
class Model:
    """A model that is measured. graphs: the parts that run, one after the other. evaluate: measures it as it is. own:
    whether it is a model of this project, which `evaluate` runs by its parts.
    """

    view: PrunableView
    graphs: Sequence[Graph]
    evaluate: Evaluate | None = None
    own: bool = False
    _inputs: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def inputs(self, batch: int) -> list[list[Tensor]]:
        """Return the inputs of each part for a batch of this size, on the model's device."""
        if batch not in self._inputs:
            drawn = [graph.random(batch, seed=batch) for graph in self.graphs]
            self._inputs[batch] = [[each.to(self.view.device) for each in part.values()] for part in drawn]
        return self._inputs[batch]

    @torch.no_grad()
    def run(self, batch: int) -> None:
        """Run all parts."""
        for graph, inputs in zip(self.graphs, self.inputs(batch), strict=True):
            graph.module(*inputs)


class Variants:
    """Builds variants in a folder, in which their files lie. dense: None where only the pruned model is known.

    tables: for each batch size, what each layer is computed by.
    """

    def __init__(self, dense: Model | None, pruned: Model, folder: Path, threads: int, clock: Callable[[], float]):
        self.dense, self.pruned, self.folder, self.threads, self.clock = dense, pruned, folder, threads, clock
        self.tables: dict[int, str] = {}
        self._fast: dict[int, Accelerated] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def build(self, kinds: Sequence[str]) -> list[Variant]:
        """Return the variants of these kinds, with all but their times."""
        found = []
        for kind in KINDS:
            found += getattr(self, f"_{kind}")() if kind in kinds else []
        return found

    def _torch(self, name: str, model: Model, *, packed: bool = False, pruned: bool = True) -> Variant:
        state = model.view.model.state_dict()
        path = self.folder / f"{name}.safetensors"
        save_state(state, path, packed=packed)
        weights = {id(p): p for p in model.view.model.parameters()}.values()
        dense, sparse = multiply_adds(model.view.model, lambda: model.run(1), 1)
        parameters = sum(int(p.count_nonzero()) if pruned else p.numel() for p in weights)
        operations = sparse if pruned else dense
        known = {"bytes": path.stat().st_size, "parameters": parameters, "operations": operations}
        quality = model.evaluate() if model.evaluate and not packed else {}
        return Variant(name, None if packed else model.run, quality=quality, **known)

    def _dense(self) -> list[Variant]:
        return [self._torch("dense", self.dense, pruned=False)] if self.dense else []

    def _masked(self) -> list[Variant]:
        return [self._torch("masked", self.pruned)]

    def _packed(self) -> list[Variant]:
        return [self._torch("packed", self.pruned, packed=True)]

    def _accelerated(self) -> list[Variant]:
        variant = self._torch("accelerated", self.pruned)
        (self.folder / "accelerated.safetensors").unlink()
        variant.bytes, variant.ready = 0, self._by_kernels  # there is no such file: layers are chosen when it is loaded
        if self.pruned.evaluate:
            with self._by_kernels(128):
                variant.quality = self.pruned.evaluate()
        return [variant]

    @contextmanager
    def _by_kernels(self, batch: int) -> Iterator[None]:
        """The pruned model's layers are computed by what is fastest for a batch of this size."""
        if batch not in self._fast:
            self._fast[batch] = accelerate(self.pruned.view, batch=batch, forward=self.pruned.run, clock=self.clock)
            self.tables[batch] = self._fast[batch].table()
        else:
            self._fast[batch].engage()
        try:
            yield
        finally:
            self._fast[batch].restore()

    def _onnx(self) -> list[Variant]:
        return [self._of_files(name, model, int8=False) for name, model in self._models()]

    def _int8(self) -> list[Variant]:
        return [self._of_files(name, model, int8=True) for name, model in self._models()]

    def _models(self) -> list[tuple[str, Model]]:
        return [*([("dense", self.dense)] if self.dense else []), ("pruned", self.pruned)]

    def _of_files(self, name: str, model: Model, *, int8: bool) -> Variant:
        """A variant in onnxruntime; int8: weights, a scale for each output channel."""
        paths = [self.folder / f"{name}.{graph.name}.onnx" for graph in model.graphs]
        for graph, path in zip(model.graphs, paths, strict=True):
            if not path.is_file():
                write_onnx(graph, path)
        if int8:
            paths = [quantise(path, path.with_suffix(".int8.onnx")) for path in paths]
        sessions = [OnnxModel(path, self.threads) for path in paths]

        def run(batch: int) -> None:
            for graph, session, inputs in zip(model.graphs, sessions, model.inputs(batch), strict=True):
                session(dict(zip(graph.inputs, (each.cpu() for each in inputs), strict=True)))

        _, operations = multiply_adds(model.view.model, lambda: model.run(1), 1)
        label = f"ONNX {'int8 ' if int8 else ''}{name}"
        size = sum(path.stat().st_size for path in paths)
        return Variant(label, run, bytes=size, operations=operations, quality=self._quality(model, sessions))

    @staticmethod
    def _quality(model: Model, sessions: Sequence[OnnxModel]) -> Mapping[str, float]:
        """Return the quality of a model whose parts are computed by these; none where an evaluation looks elsewhere."""
        names = [graph.name for graph in model.graphs]
        methods = methods_of(dict(zip(names, sessions, strict=True))) if model.own else {}
        if model.evaluate is None or not methods:
            return {}
        with computed_by(model.view.model, methods):
            return model.evaluate()
