"""Gradients of the loss on the prunable weights, or their squares, averaged over calibration batches, without a trace
in the model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.statistics.checks import IDLE, NO_BATCHES, finite, look, not_finite, not_reached, summed, watched
from sparsity.statistics.inputs import untouched
from sparsity.view import PrunableView, PrunableWeight


def mean_gradients(
    view: PrunableView,
    batches: Iterable[Any],
    *,
    seed: int = 42,
    generators: Callable[[int], torch.Generator] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    announced: int | None = None,
) -> dict[str, Tensor]:
    """Name -> the gradient (out, in) of the mean loss over the batches, in evaluation mode; float32 where the model is
    in half precision.

    With two sources read in lockstep, this is the gradient of (L_general + L_region) / 2. generators: batch number ->
    the generator of what the loss draws (ITM negatives); by default a function of `seed` and the number alone. reduce:
    sums a tensor over ranks, each of which reads its own batches. announced: how many are to come here, where `batches`
    does not say it; fewer are used, with a warning.

    Raises UserError without batches, and, naming all layers concerned, for weights that get no gradient from any batch
    (a warning after the first) and for NaN or Inf (already after the first batch).
    """
    with Gradients(view, generators or (lambda number: batch_generator(seed, number))) as gradients:
        for batch in watched(batches, announced, partial(gradients.look, reduce)):
            gradients.add(batch)
    return gradients.means(reduce)


class Gradients:
    """Adds up the gradients of the loss on the prunable weights, batch by batch.

    Inside the `with` the model is in evaluation mode; afterwards it is what it was, also after an exception. squared:
    the square of each batch's gradient is added up, in its place.
    """

    def __init__(self, view: PrunableView, generators: Callable[[int], torch.Generator], *, squared: bool = False):
        self._view, self._generators, self._count, self._squared = view, generators, 0, squared
        self._sums: dict[str, Tensor] = {}
        self._arriving: dict[str, Tensor] = self._sums  # of one batch, where they are squared
        self._stack = ExitStack()

    def __enter__(self) -> "Gradients":
        with ExitStack() as stack:
            stack.enter_context(untouched(self._view.model, self._view.moved_by_loss))
            stack.enter_context(only_prunable(self._view))
            self._arriving = stack.enter_context(summed_gradients(self._view))
            self._sums = {} if self._squared else self._arriving
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def add(self, batch: Any) -> None:
        """Run the loss of one batch forward and backward."""
        with torch.enable_grad():
            self._view.loss(batch, self._generators(self._count)).backward()
        self._count += 1
        if self._squared:  # not in the hook: a backward within a backward gives a weight's gradient in parts
            for name in list(self._arriving):
                square = self._arriving.pop(name).square_()
                self._sums[name] = self._sums[name].add_(square) if name in self._sums else square

    def look(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Report what the first batch tells: every rank calls this once, after its first batch, or without one.

        UserError, naming all layers, for gradients with NaN or Inf; layers without gradient on all ranks are a warning.
        """
        sums = self._sums
        facts = {name: (name in sums, name not in sums or finite(sums[name])) for name in self._view.weights}
        look(IDLE, "gradient", facts, self._device, reduce)

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Return name -> mean gradient, or mean square, (out, in) over the batches of all ranks; the sums are given up
        for it.
        """
        reached = [int(name in self._sums) for name in self._view.weights]
        total, *ranks = summed([self._count, *reached], self._device, reduce)
        if not total:
            raise UserError(NO_BATCHES)
        idle = [name for name, count in zip(self._view.weights, ranks, strict=True) if not count]
        if idle:
            raise not_reached(IDLE, idle)
        result, bad = {}, []
        for name, weight in self._view.weights.items():
            gradient = self._sums.pop(name, None)  # nothing holds it beside its sum over ranks
            if reduce:
                gradient = reduce(nothing(weight) if gradient is None else gradient)
            assert gradient is not None, "its one rank has reached it"
            if not finite(gradient):
                bad.append(name)
            result[name] = weight.as_matrix(gradient).div_(total)
        if bad:
            raise not_finite("gradient", bad)
        return result

    @property
    def _device(self) -> torch.device:
        return self._view.device  # ranks on GPUs add up what lies there


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
