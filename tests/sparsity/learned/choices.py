"""Choosing masks from scores, as a plan does."""

from sparsity.allocation.base import Part
from sparsity.run.axes import ALLOCATIONS
from sparsity.run.select import budgets, follow, select


def choice(view, sparsity, *, pattern=None, allocation="global"):
    """scores(names) -> (name, score) is turned into (name, kept)."""

    def choose(scores):
        names = list(view.weights)
        if pattern:
            return follow(pattern, scores(names))
        parts = budgets(Part(view, names, scores, {}), [sparsity], {})
        return ((name, kept) for name, (kept,) in select(parts, ALLOCATIONS.find(allocation)(), "layer"))

    return choose
