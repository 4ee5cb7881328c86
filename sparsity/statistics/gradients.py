"""Gradients of the loss on the prunable weights, averaged over calibration batches, without a trace in the model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.statistics.inputs import untouched
from sparsity.view import PrunableView, PrunableWeight


def mean_gradients(
    view: PrunableView,
    batches: Iterable[Any],
    *,
    seed: int = 42,
    generators: Callable[[int], torch.Generator] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Name -> the gradient (out, in) of the mean loss over the batches, in evaluation mode; float32 where the model is
    in half precision.

    With two sources read in lockstep, this is the gradient of (L_general + L_region) / 2. generators: batch number ->
    the generator of what the loss draws (ITM negatives); by default a function of `seed` and the number alone. reduce:
    sums a tensor over ranks, each of which reads its own batches.

    Raises UserError without batches, for a weight that gets no gradient, and for NaN or Inf, naming the layer.
    """
    generators = generators or (lambda number: batch_generator(seed, number))
    with untouched(view.model, view.moved_by_loss), only_prunable(view), summed_gradients(view) as sums:
        count = 0
        for count, batch in enumerate(batches, 1):
            with torch.enable_grad():
                view.loss(batch, generators(count - 1)).backward()
    gradients = {name: sums.get(name) for name in view.weights}
    device = next(iter(view.weights.values())).parameter.device  # ranks on GPUs add up what lies there
    seen = torch.tensor([count, *(gradient is not None for gradient in gradients.values())], dtype=torch.float32)
    total, *reached = (reduce(seen.to(device)) if reduce else seen).tolist()
    if not total:
        raise UserError("there are no calibration batches")
    result = {}
    for (name, gradient), ranks in zip(gradients.items(), reached, strict=True):
        if not ranks:
            raise UserError(f"layer {name!r} got no gradient from the loss; keep it dense (keep_dense, --exclude)")
        if reduce:
            gradient = reduce(nothing(view.weights[name]) if gradient is None else gradient)
        assert gradient is not None, "its one rank has reached it"
        if not gradient.isfinite().all():
            raise UserError(f"the gradient of layer {name!r} holds NaN or Inf")
        matrix = view.weights[name].as_matrix(gradient)
        result[name] = matrix.div_(total)
    return result


def batch_generator(seed: int, number: int) -> torch.Generator:
    """Generator of what the loss draws in one batch: the same for any number of workers and ranks."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of weights of this one add up: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def nothing(weight: PrunableWeight) -> Tensor:
    """The sum of no gradients, in the parameter's own layout."""
    return torch.zeros_like(weight.parameter.detach(), dtype=wide(weight.parameter.dtype))


@contextmanager
def summed_gradients(view: PrunableView) -> Iterator[dict[str, Tensor]]:
    """Add up the gradients of the prunable weights outside of the parameters, as they arrive: name -> their sum so far,
    in the parameter's own layout. What is taken out of the mapping begins anew.

    `.grad` adds up in the weight's dtype: in bfloat16, which has 8 bits, a hundred batches would be off by a per cent.
    Here each gradient is freed as soon as it has been added.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, weight in view.weights.items():
            hook = partial(_move_gradient, sums, name)
            stack.callback(weight.parameter.register_post_accumulate_grad_hook(hook).remove)
        yield sums


@torch.no_grad()
def _move_gradient(sums: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "the hook comes after it is there"
    if name in sums:
        sums[name].add_(gradient)
    else:
        sums[name] = gradient.to(wide(gradient.dtype))  # no one else has it


@contextmanager
def only_prunable(view: PrunableView) -> Iterator[None]:
    """Gradients for the prunable weights alone; flags and gradients are put back, also after an exception."""
    prunable = {id(weight.parameter) for weight in view.weights.values()}
    before: list[tuple[nn.Parameter, bool, Tensor | None]] = [
        (p, p.requires_grad, p.grad) for p in view.model.parameters()
    ]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in prunable)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
