"""How far the output of a model moves when one of its layers is changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.replay.repeated import Budget, Repeated
from sparsity.replay.trace import units
from sparsity.statistics.inputs import untouched
from sparsity.view import Output, PrunableView, PrunableWeight, eager

_MOST = 1 << 20  # numbers of an output that are compared: of a larger one, evenly spread


class Outputs:
    """The outputs of the model as it is for a few batches, on the host: those of its view, or what its forward returns.
    Raises UserError where that is no tensor.

    budget: bytes of what blocks take and give for these batches that are kept, so that blocks before the one that is
    changed, and other towers, run once only (default: all).
    """

    def __init__(self, view: PrunableView, batches: Sequence[Any], budget: int | None = None):
        self._view, self._batches = view, batches
        self._run: Callable[[Any], Any] = view.outputs if view.has_outputs else view.forward
        blocks, left = units(view), Budget(budget)
        self._repeated = [Repeated(blocks, left) for _ in batches]
        self._before: list[list[Tensor]] = []
        with _quiet(view):
            for batch, repeated in zip(batches, self._repeated, strict=True):
                with repeated.recorded():
                    self._before.append(_tensors(self._run(batch)))
        if not all(self._before):
            raise UserError(
                "--allocation error:output compares what the model gives for a batch, and its view's forward returns no"
                " tensor: take --allocation error"
            )

    def change(self, weight: PrunableWeight, changed: Tensor) -> float:
        """Return by how much the outputs move where a weight is replaced by `changed`, (out, in): the squared distance
        over the squared norm, summed over outputs and batches.
        """
        total = 0.0
        with _quiet(self._view), _replaced(weight, changed):
            for batch, before, repeated in zip(self._batches, self._before, self._repeated, strict=True):
                with repeated.repeated(weight.parameter):
                    after = _tensors(self._run(batch))
                for was, now in zip(before, after, strict=True):
                    size = float(was.square().sum())
                    total += float((now - was).square().sum()) / size if size > 0 else 0.0
        return total


@contextmanager
def _quiet(view: PrunableView) -> Iterator[None]:
    with untouched(view.model), eager(view.model), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _replaced(weight: PrunableWeight, changed: Tensor) -> Iterator[None]:
    """The model reads other numbers in place of a weight, whose own tensor is never written to."""
    parameter = weight.parameter
    original = parameter.data
    parameter.data = weight.as_stored(changed).to(original).contiguous()
    torch.clear_autocast_cache()  # it holds what the weight was
    try:
        yield
    finally:
        parameter.data = original
        torch.clear_autocast_cache()


def _tensors(output: Any) -> list[Tensor]:
    """Return the numbers of all outputs of a batch, each (n,), float64, on the host, without padding. Logits have a
    mean of 0, since a softmax is taken of them; a loss beside them is no output.
    """
    if isinstance(output, Output):
        tensor = output.tensor if output.real is None else output.tensor[output.real]
        return [_spread(tensor - tensor.mean(-1, keepdim=True) if output.kind == "logits" else tensor)]
    if isinstance(output, Tensor):
        return [_spread(output)] if output.is_floating_point() and output.ndim else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for each in output for tensor in _tensors(each)] if isinstance(output, list | tuple) else []


def _spread(output: Tensor) -> Tensor:
    flat = output.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _MOST) or 1].cpu().to(torch.float64, copy=True)
