"""Measurements of the passes over the data; of those, what pruning each layer by itself costs, as allocations and
reports have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.base import ZEROTH_ORDER
from sparsity.allocation.budget import Sparsity, fraction
from sparsity.statistics.gradient_rows import Scratch

Curve = Mapping[Fraction, float]  # sparsity -> a number


@dataclass(frozen=True)
class Sensitivity:
    """Hold what was measured of each layer, in prunable order; what no one asked for is empty.

    errors: relative error of its output at each sparsity of its ladder, ascending. outputs: how far the model's output
    moves (relative squared change) for each unit of that error, when the layer alone is pruned to a target. importance:
    of ECoFLaP's zeroth order.
    """

    errors: Mapping[str, Curve] = field(default_factory=dict)
    outputs: Mapping[str, Curve] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)

    def error(self, name: str, sparsities: Sequence[Fraction]) -> list[float]:
        """Return the errors of a layer. Raises ValueError for a sparsity that was not measured."""
        return [_at(self.errors, name, sparsity) for sparsity in sparsities]

    def output(self, name: str, sparsity: Sparsity) -> float:
        """Return what the model's output moves by at a target. Raises ValueError for one that was not measured."""
        return _at(self.outputs, name, fraction(sparsity))

    @property
    def statistics(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the importance as allocations read it; none where it was not measured."""
        found = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.importance.items()}
        return {ZEROTH_ORDER: found} if found else {}


@dataclass
class Measured:
    """Result of the first pass over the data.

    statistics: name of a statistic -> name of a weight -> tensor. whole: what a reconstruction of the whole model reads
    instead. origin: identity of data, model and arithmetic, and a path beside which what is done is kept. sensitivity:
    of each layer, where the allocation asks for it.
    """

    statistics: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    whole: Any = None
    origin: Scratch | None = None
    sensitivity: Sensitivity = field(default_factory=Sensitivity)


def _at(curves: Mapping[str, Curve], name: str, sparsity: Fraction) -> float:
    if sparsity not in curves.get(name, {}):
        raise ValueError(f"layer {name!r} was not measured at {float(sparsity):.4g}: measure with the same request")
    return curves[name][sparsity]
