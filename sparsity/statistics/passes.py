"""The statistics that a pruner can ask for, by name: each is one pass over the calibration batches."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.inputs import MEASURES, Statistics
from sparsity.view import PrunableView

OF_INPUTS = (*MEASURES, "hessian")
PASSES = (*OF_INPUTS, "mean_gradient")


def collect(
    view: PrunableView,
    statistic: str,
    batches: Iterable[Any],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    generators: Callable[[int], torch.Generator] | None = None,
    names: Collection[str] | None = None,
    offload: bool = False,
) -> dict[str, Tensor]:
    """Name of each prunable weight -> its statistic over the batches.

    reduce: sums a tensor over ranks, each of which reads its own batches. generators: number of a batch -> the
    generator of what the loss draws there. names: of the weights that are asked about (default: all), offload: whether
    sums are kept in the processor's memory; neither is for gradients. "hessian" is (2/n) X X^T over the n real tokens,
    as strips (`sparsity.statistics.hessian`). Raises UserError for a statistic that does not exist.
    """
    if statistic == "mean_gradient":
        return mean_gradients(view, batches, generators=generators, reduce=reduce)
    scaled = statistic == "hessian"
    with Statistics(view, "gram" if scaled else statistic, names, offload=offload) as statistics:
        for batch in batches:
            statistics.add(batch)
    if reduce:
        statistics.reduce(reduce)
    found = statistics.result()
    return {name: sums.mul_(2 / statistics.tokens[name]) for name, sums in found.items()} if scaled else found
