"""Sparsities that a file gives, and the file that a run leaves."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from glob import escape
from typing import Any

from torch import Tensor

from sparsity.allocation.base import Allocation, Contest, Part
from sparsity.allocation.budget import Sparsity, as_written
from sparsity.allocation.ratios import Limits, each_alone, limits, rounded, total_of
from sparsity.errors import UserError
from sparsity.view import PrunableView, PrunableWeight


class Given(Allocation):
    """Sparsity by layer or group: the first rule that matches holds, and the other layers are filled to the budget, all
    with the same ratio.

    rules: a glob over names of layers ("vision.*") or of their weights ("vision.fc.weight"), or a group -> a sparsity:
    a fraction from 0 to below 1, a percentage from 1 to 100, or "pruned/total", which is exact. The counts of the
    layers that match are rounded together, by largest remainder. Rules hold at every sparsity that is asked for.
    """

    local = True

    def __init__(self, rules: Mapping[str, Sparsity]):
        self.rules = {rule: _parse(rule, value) for rule, value in rules.items()}

    def facts(self) -> dict[str, Any]:
        """Return what the provenance of masks says of it."""
        return {"allocation": self.name, "allocation_rules": {rule: str(ratio) for rule, ratio in self.rules.items()}}

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return a contest for each layer.

        Raises:
            UserError: a rule that matches no layer of the model, that the bounds of a layer forbid, or rules with which
                the budget cannot be met.
        """
        for rule in self.rules:
            if not any(_matches(rule, weight) for weight in part.view.weights.values()):
                raise UserError(f"the allocation's rule {rule!r} matches no prunable layer and no group")
        bounds = limits(part)
        ratios = [self._ratio(part.view.weights[name]) for name in part.names]
        return each_alone(part, [self._counts(part, sparsity, bounds, ratios) for sparsity in sparsities])

    def _ratio(self, weight: PrunableWeight) -> Fraction | None:
        return next((ratio for rule, ratio in self.rules.items() if _matches(rule, weight)), None)

    def _counts(self, part: Part, sparsity: Sparsity, bounds: Limits, ratios: Sequence[Fraction | None]) -> list[int]:
        total, sizes = total_of(part, sparsity, bounds), part.sizes
        shares = {i: ratio * sizes[i] for i, ratio in enumerate(ratios) if ratio is not None}
        rest = [i for i in range(len(sizes)) if i not in shares]
        lowest, highest = (sum(map(to_whole, shares.values())) for to_whole in (math.floor, math.ceil))
        # Without a rest the rules alone must make the budget: up to the rounding of each layer.
        ruled = math.floor(sum(shares.values())) if rest else min(max(total, lowest), highest)
        counts = dict(zip(shares, rounded(list(shares.values()), ruled), strict=True))
        for i, count in counts.items():
            if not bounds.least[i] <= count <= bounds.most[i]:
                raise UserError(
                    f"the allocation's rule for layer {part.names[i]!r} prunes {count} of its {sizes[i]} weights,"
                    f" and from {bounds.least[i]} to {bounds.most[i]} can be pruned (--min_keep, --max_keep, pruned"
                    " already)"
                )
        free = Limits(*([each[i] for i in rest] for each in (sizes, bounds.least, bounds.most)))
        if not sum(free.least) <= total - ruled <= sum(free.most):
            raise UserError(
                f"the allocation's rules prune {ruled} of {part.numel} weights, and the {len(rest)} layers without a"
                f" rule cannot make that the {total} of the sparsity: change a rule, or the sparsity"
            )
        counts |= zip(rest, free.prune(total - ruled, [Fraction(size) for size in free.sizes]), strict=True)
        return [counts[i] for i in range(len(sizes))]


def _parse(rule: str, value: Sparsity) -> Fraction:
    exact = as_written(value)
    if exact is not None and exact >= 1 and "/" not in str(value):
        exact /= 100
    if exact is None or not 0 <= exact <= 1:
        raise UserError(
            f"the allocation's rule {rule!r}: a sparsity is a fraction below 1, a percentage from 1 to 100 or"
            f" 'pruned/total', got {value!r:.60}"
        )
    return exact


def _matches(rule: str, weight: PrunableWeight) -> bool:
    """Return whether a rule is the group of a weight, or a glob of one of its names or of a layer's that uses it."""
    names = [name for key in weight.aliases for name in (key, key.removesuffix(".weight"))]
    return rule == weight.group or any(fnmatchcase(name, rule) for name in names)


def to_rules(view: PrunableView, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what masks (name -> bool, True where kept) take from each layer, as rules of `Given` that give the same
    counts again: name of the weight, as a glob that matches it alone -> "pruned/total".
    """
    return {
        escape(name): f"{mask.numel() - int(mask.count_nonzero())}/{mask.numel()}"
        for name, mask in ((name, masks[name]) for name in view.weights)
    }
