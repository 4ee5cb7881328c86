"""OWL: blocks with more outliers are kept denser."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, fraction
from sparsity.allocation.ratios import each_alone, limits, total_of
from sparsity.errors import UserError
from sparsity.view import PrunableView

_OUTLIER = 5  # times the mean of a block's scores
_RANGE = Fraction(8, 100)  # keep ratios differ by at most twice as much


class Owl(Allocation):
    """Outlier-weighed layer-wise sparsity, arXiv 2310.05175: the layers of a block keep (1 - s) + 0.16 (D - min D) /
    (max D - min D), minus the mean of that second term over all weights, where D is the share of the block's Wanda
    scores that are above 5 times their mean.

    A layer outside every block of the view is a block of its own; a tied weight belongs to the first block that uses
    it. What clips free or cost changes the keep ratios of the others in proportion to them; a ratio below 0 counts as
    0. Where all D are equal every layer keeps the same ratio. Scores are read twice, one layer at a time.
    """

    statistics = ("input_norms",)
    local = True

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer."""
        bounds, sizes = limits(part), part.sizes
        more = _more(_outliers(part), sizes)
        counts = []
        for sparsity in sparsities:
            keep = [max(1 - fraction(sparsity) + each, Fraction(0)) for each in more]
            wanted = [ratio * size for ratio, size in zip(keep, sizes, strict=True)]
            counts.append(bounds.keep(total_of(part, sparsity, bounds), wanted))
        return each_alone(part, counts)


def _more(outliers: Sequence[Fraction], sizes: Sequence[int]) -> list[Fraction]:
    """Return by how much the keep ratio of each layer is above the mean; weighted by size they add up to 0."""
    lowest, highest = min(outliers), max(outliers)
    terms = [2 * _RANGE * (each - lowest) / ((highest - lowest) or Fraction(1)) for each in outliers]
    mean = sum((term * size for term, size in zip(terms, sizes, strict=True)), Fraction(0)) / sum(sizes)
    return [term - mean for term in terms]


def _outliers(part: Part) -> list[Fraction]:
    """Return D for each layer, that of its block."""
    found = {}
    for names in _blocks(part.view, part.names):
        numel = sum(part.view.weights[name].numel for name in names)
        total = sum(float(_scores(part, name).sum()) for name in names)
        outliers = sum(int((_scores(part, name) > _OUTLIER * total / numel).count_nonzero()) for name in names)
        found |= dict.fromkeys(names, Fraction(outliers, numel))
    return [found[name] for name in part.names]


def _scores(part: Part, name: str) -> Tensor:
    """Return Wanda's scores |W_ij| ||X_j|| of a layer, (out, in), float64. The norms are sums over samples: a factor
    that a block's layers share changes no D.
    """
    weight = part.view.weights[name].matrix()
    scores = weight.abs().to(torch.float64) * part.statistics["input_norms"][name].to(weight.device).sqrt()
    if not scores.isfinite().all():
        raise UserError(f"the weight or the inputs of layer {name!r} hold NaN or Inf")
    return scores


def _blocks(view: PrunableView, names: Sequence[str]) -> list[list[str]]:
    """Return the names, block by block; where blocks lie in each other, by the inner one."""
    home = {id(module): i for i, block in enumerate(view.blocks or ()) for module in block.modules()}
    found: dict[int | str, list[str]] = {}
    for name in names:
        inside = [home[id(module)] for module in view.weights[name].modules if id(module) in home]
        found.setdefault(min(inside) if inside else name, []).append(name)
    return list(found.values())
