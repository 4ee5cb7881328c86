"""Block steps (`--block_steps N`): what pruning has kept of a block is trained to give what the dense block gives.

With f the block on the inputs that the pruned model gives it, and y the output of the dense block on the dense model's
inputs, N steps of Adam lower the squared error |f - y|^2 / |y|^2 over the training samples of a few batches; a tenth of
the samples of each batch is held out, and the values with the lowest error on these are the result, the start among
them. Gradients of pruned weights are zero, so that these stay exactly zero. (arXiv 2510.14444: windows with a
nonlinearity in them gain more than single matrices.)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.replay.uses import Use
from sparsity.statistics.inputs import widest
from sparsity.statistics.streams import held_out

RATE = 1e-2  # peak of the learning rate, in units of the root mean square of what is kept of a parameter
ROUNDS = 4  # of batches in a step, on all ranks together
VALIDATIONS = 5  # besides that of the start
HELD_ROUNDS = 32  # that a validation reads, of those that have held-out samples
_BETAS, _EPS = (0.9, 0.95), 1e-8  # rounding in gradients that are 0, as of biases of keys, moves nothing
_TENTH = 10

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """The outcome for one block.

    values: of the parameters, in their dtypes; None where no step was better than the start. before, after: squared
    error over squared output, of the held-out samples, at the start and of `values`. step: after which these were.
    """

    values: dict[str, Tensor] | None
    before: float
    after: float
    step: int


def check_steps(steps: int, window: str, windows: Sequence[str]) -> int:
    """Return the number of steps. UserError unless it is a whole number from 0, and the window is one of these."""
    if not isinstance(steps, int) or steps < 0:
        raise UserError(f"block_steps must be a whole number from 0, got {steps!r:.60}")
    if window not in windows:
        raise UserError(f"block_window must be one of {', '.join(windows)}, got {window!r}")
    return steps


def train(
    uses: Sequence[tuple[int, Use]],
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
    steps: int,
    *,
    rounds: int,
    reduce: Reduce | None = None,
) -> Trained:
    """Train the parameters of a block, whose values it changes in place, and return the best ones.

    uses: (number of its round, a batch) of this rank. parameters: they hold the start in storage of their own. kept:
    key -> bool, of those that are pruned, in their layout. rounds: of batches, on all ranks. reduce: sums a tensor over
    ranks, which must all have the same parameters; else there is one.
    """
    # Masters in float32 or wider take the steps; the parameters hold them in their own dtype.
    values = {key: _wide(parameter.detach()).clone() for key, parameter in parameters.items()}
    kept = {key: mask.to(values[key].device) for key, mask in kept.items() if key in values}
    rates = {key: RATE * scale for key, scale in _scales(values, kept).items()}
    optimizer = torch.optim.Adam([{"params": [value]} for value in values.values()], betas=_BETAS, eps=_EPS)
    every = -(-steps // VALIDATIONS)
    device = next(iter(values.values())).device
    before = best = _held_out_error(uses, device, reduce)
    found, at = None, 0
    with _with_gradients(parameters.values()):
        for step in range(steps):
            now = {(step * ROUNDS + i) % rounds for i in range(ROUNDS)}
            gradients = _gradients([use for use in uses if use[0] in now], list(parameters.values()), reduce)
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            for (key, value), group, gradient in zip(values.items(), optimizer.param_groups, gradients, strict=True):
                value.grad = gradient.masked_fill_(~kept[key], 0) if key in kept else gradient
                group["lr"] = cosine * rates[key]
            optimizer.step()
            for key, parameter in parameters.items():
                parameter.data.copy_(values[key])
            if (step + 1) % every and step + 1 < steps:
                continue
            error = _held_out_error(uses, device, reduce)
            if error < best:  # never where it is NaN
                best, at = error, step + 1
                found = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    return Trained(found, before, best, at)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scales(values: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the root mean square of what is kept of each parameter; biases that are all but zero get the weights'."""
    squares = {key: float(value.square().sum(dtype=torch.float32)) for key, value in values.items()}
    counts = {key: int(kept[key].count_nonzero()) if key in kept else value.numel() for key, value in values.items()}
    scales = {key: math.sqrt(square / max(1, counts[key])) for key, square in squares.items()}
    weights = [scale for key, scale in scales.items() if key in kept]
    least = sum(weights) / len(weights) if weights else 0.0
    return {key: scale if key in kept else max(scale, least) for key, scale in scales.items()}


@contextmanager
def _with_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    parameters = list(parameters)
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)


def _gradients(
    uses: Sequence[tuple[int, Use]], parameters: Sequence[nn.Parameter], reduce: Reduce | None
) -> list[Tensor]:
    """Return the gradients of the relative squared error over the training samples of these batches, of all ranks."""
    sums = [torch.zeros_like(_wide(parameter.detach())) for parameter in parameters]
    total = torch.zeros((), dtype=widest(sums[0].device), device=sums[0].device)
    for number, use in uses:
        with torch.enable_grad():
            error, power, count = _squares(number, use, held=False)
        if not count:
            continue
        total += power
        # A factor keeps gradients of activations in half precision away from zero: |y|^2 grows with the count.
        factor = math.sqrt(count) / max(float(power), torch.finfo(torch.float32).tiny)
        own = torch.autograd.grad(error, parameters, torch.full_like(error, factor), allow_unused=True)
        for grad, added in zip(sums, own, strict=True):
            if added is not None:
                grad.add_(added.to(grad.dtype), alpha=1 / factor)
    if reduce is not None:
        sums, total = [reduce(grad) for grad in sums], reduce(total)
    return [grad.div_(total.clamp(min=torch.finfo(grad.dtype).tiny).to(grad.dtype)) for grad in sums]


@torch.no_grad()
def _held_out_error(uses: Sequence[tuple[int, Use]], device: torch.device, reduce: Reduce | None) -> float:
    """Return the relative squared error over the held-out samples of the first batches, of all ranks."""
    total = torch.zeros(2, dtype=widest(device), device=device)
    for number, use in uses:
        samples = min(_TENTH, *(shape[0] for shape in use.shapes)) if use.shapes else 0
        if samples and number * samples < _TENTH * HELD_ROUNDS:  # where batches are small, only every tenth has some
            error, power, count = _squares(number, use, held=True)
            if count:
                total += torch.stack([error, power]).to(total)
    error, power = (total if reduce is None else reduce(total)).tolist()
    return error / power if power else math.inf


def _squares(number: int, use: Use, *, held: bool) -> tuple[Tensor, Tensor, int]:
    """Return |f - y|^2 and |y|^2 over a batch's samples that are held out, or over the others, and the numbers in y."""
    picked = [held_out(shape, number, torch.device("cpu")) == held for shape in use.shapes]
    picked = [rows if real is None else rows & real.cpu() for rows, real in zip(picked, use.real, strict=True)]
    count = sum(int(rows.sum()) * shape[-1] for rows, shape in zip(picked, use.shapes, strict=True))
    error = power = torch.zeros(())
    if count:
        for output, wanted, rows in zip(use.run(), use.wanted(), picked, strict=True):
            rows = rows.to(output.device)
            y = _wide(wanted[rows])
            error, power = error + (_wide(output[rows]) - y).square().sum(), power + y.square().sum()
    return error, power, count
