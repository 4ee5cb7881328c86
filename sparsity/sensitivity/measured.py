"""What pruning each layer by itself would cost: the curves on which allocations decide, and reports show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from sparsity.allocation.budget import Sparsity, fraction

Curve = Mapping[Fraction, float]  # sparsity -> a number


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of each layer, in prunable order; what no one asked for is empty.

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


def _at(curves: Mapping[str, Curve], name: str, sparsity: Fraction) -> float:
    if sparsity not in curves.get(name, {}):
        raise ValueError(f"layer {name!r} was not measured at {float(sparsity):.4g}: measure with the same request")
    return curves[name][sparsity]
