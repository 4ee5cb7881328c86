"""ECoFLaP: layers on which the loss depends more are kept denser. Forward passes only."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from sparsity.allocation.base import ZEROTH_ORDER, Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity
from sparsity.allocation.ratios import Limits, each_alone, exact, limits, total_of
from sparsity.errors import UserError
from sparsity.statistics.gradients import batch_generator, wide
from sparsity.statistics.inputs import untouched
from sparsity.view import PrunableView, PrunableWeight

_FLOOR = Fraction(2, 10)  # of each layer that is kept whatever its importance: 1 - 0.8


class Ecoflap(Allocation):
    """ECoFLaP, arXiv 2310.02998, zeroth order: each layer keeps a fifth of its weights, and the rest of the budget is
    kept in proportion to importance (`zeroth_order`): the counts, not the ratios.

    Layers of one size and importance keep the same ratio. All layers do where nothing is important, and at sparsities
    above 0.8, where there is no fifth to keep. What a full layer, or a clip, frees or costs goes to the others above
    their fifth in proportion to importance. A layer that must lose more (pruned already, --max_keep) keeps what it may.
    """

    statistics = (ZEROTH_ORDER,)
    local = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer. UserError for an importance that is not finite, naming the layer."""
        bounds = limits(part)
        importances = exact(part, {name: float(part.statistics[ZEROTH_ORDER][name]) for name in part.names})
        totals = [total_of(part, sparsity, bounds) for sparsity in sparsities]
        return each_alone(part, [counts_of(importances, total, bounds) for total in totals])


def counts_of(importances: Sequence[Fraction], total: int, bounds: Limits) -> list[int]:
    """Return how many weights each layer loses, `total` together, by the importance of the layers."""
    sizes = [Fraction(size) for size in bounds.sizes]
    most = [
        max(least, min(most, math.floor((1 - _FLOOR) * size)))
        for size, least, most in zip(sizes, bounds.least, bounds.most, strict=True)
    ]
    if not any(importances) or sum(most) < total:
        return bounds.prune(total, sizes)
    # Beyond the floors: as if each layer had only the weights above its own.
    return Limits(most, bounds.least, most).keep(total, importances)


def zeroth_order(
    view: PrunableView,
    batches: Iterable[Any],
    generators: Callable[[int], torch.Generator] | None = None,
    *,
    epsilon: float = 1e-3,
    seed: int = 42,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the importance of each layer, name -> g^2 * sum of w^2 (0-dim, float64, on the CPU), where g is the mean
    over batches of |L(w + e z) - L(w - e z)| / (2 e), in evaluation mode.

    A batch is one sample of that mean. z is a normal draw for the whole layer, another one for each batch, that depends
    on the seed, the batch and the layer's name alone. Both losses of a pair begin with the same buffers and draw the
    same. The model's own weights are never written to: a layer reads a perturbed copy meanwhile. A batch costs two
    forward passes a layer, and memory two copies of the largest layer, beside those of buffers and of what the loss
    moves.

    Args:
        generators: batch number -> the generator of what the loss draws; by default a function of `seed` and the
            number alone.
        epsilon: e; the perturbation is rounded to the weight's dtype.
        reduce: sums a tensor over ranks, each of which reads its own batches.

    Raises:
        UserError: no batches, or a loss that is NaN or Inf, naming the layer.
    """
    generators = generators or (lambda number: batch_generator(seed, number))
    sums = torch.zeros(len(view.weights) + 1, dtype=torch.float64)  # the last counts batches
    for number, batch in enumerate(batches):
        sums[-1] += 1
        for i, weight in enumerate(view.weights.values()):
            own = crc32(f"{seed} {generators(number).initial_seed()} {weight.name}".encode())
            above, below = (_loss(view, weight, batch, generators(number), e, own) for e in (epsilon, -epsilon))
            if not math.isfinite(above - below):
                raise UserError(f"the loss is NaN or Inf where layer {weight.name!r} is changed by {epsilon}")
            sums[i] += abs(above - below) / (2 * epsilon)
    device = view.device  # ranks on GPUs add up what lies there
    *slopes, count = (reduce(sums.to(device)) if reduce else sums).tolist()
    if not count:
        raise UserError("there are no calibration batches")
    return {
        name: weight.matrix().to(torch.float64, copy=True).square_().sum().cpu() * (slope / count) ** 2
        for (name, weight), slope in zip(view.weights.items(), slopes, strict=True)
    }


@torch.no_grad()
def _loss(
    view: PrunableView, weight: PrunableWeight, batch: Any, generator: torch.Generator, step: float, seed: int
) -> float:
    with _perturbed(weight, step, seed), untouched(view.model, view.moved_by_loss):
        return float(view.loss(batch, generator))


@contextmanager
def _perturbed(weight: PrunableWeight, step: float, seed: int) -> Iterator[None]:
    """The layer reads w + step * z, with z drawn from the seed, and its own tensor again afterwards."""
    parameter = weight.parameter
    original = parameter.data
    z = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed), dtype=wide(original.dtype))
    parameter.data = z.to(original.device).mul_(step).add_(original).to(original.dtype)
    torch.clear_autocast_cache()  # it holds what the weight was, also under an autocast of the caller's
    try:
        yield
    finally:
        parameter.data = original
        torch.clear_autocast_cache()
