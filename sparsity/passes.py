"""The statistics that a pruner can ask for, by name: each is one pass over the calibration batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsity.gradients import mean_gradients
from sparsity.statistics import MEASURES, Statistics
from sparsity.view import PrunableView

PASSES = (*MEASURES, "mean_gradient")


def collect(
    view: PrunableView,
    statistic: str,
    batches: Iterable[Any],
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    generators: Callable[[int], torch.Generator] | None = None,
) -> dict[str, Tensor]:
    """Name of each prunable weight -> its statistic over the batches.

    reduce: sums a tensor over ranks, each of which reads its own batches. generators: number of a batch -> the
    generator of what the loss draws there. Raises ValueError for a statistic that does not exist.
    """
    if statistic == "mean_gradient":
        return mean_gradients(view, batches, generators=generators, reduce=reduce)
    with Statistics(view, statistic) as statistics:
        for batch in batches:
            statistics.add(batch)
    if reduce:
        statistics.reduce(reduce)
    return statistics.result()
