from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pruners.base import Again, Measured
from pruners.snip import SNIP
from sparsity.allocation.budget import Sparsity, check_schedule, step_sparsity
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.run.request import Request
from sparsity.view import PrunableView


class IterSNIP(SNIP):
    """Iterative SNIP, arXiv 2006.09081: at each of `epochs` steps the model as pruned so far is scored on fresh
    batches, and pruned further, to the sparsity that the schedule gives. What is pruned stays pruned."""

    def __init__(self, epochs: int = 1, schedule: str = "exp"):
        check_schedule(epochs, schedule)
        self.epochs, self.schedule = epochs, schedule
        self._kept: Masks | None = None  # the masks of the step before

    def scores(
        self,
        view: PrunableView,
        statistics: Mapping[str, Tensor],
        *,
        seed: int = 42,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        for name, score in super().scores(view, statistics, seed=seed, names=names):
            # Below every survivor, also where survivors score 0.
            yield name, score if self._kept is None else torch.where(_mask(view, self._kept, name), score, -1.0)

    def masks(
        self, view: PrunableView, statistics: Measured, request: Request, again: Again | None = None
    ) -> Iterator[tuple[Sparsity, Masks]]:
        if request.pattern and self.epochs > 1:
            raise UserError("itersnip prunes step by step to a sparsity: a pattern needs epochs = 1")
        if request.pattern:
            yield from super().masks(view, statistics, request)
            return
        if again is None and self.epochs > 1:
            raise UserError("itersnip needs fresh batches in each of its epochs")
        for one in request.each():
            self._kept = None
            kept = self._step(view, statistics, one, 1)
            for step in range(2, self.epochs + 1):
                assert again is not None, "there is one step, or fresh batches for each"
                self._kept = kept
                with kept.applied(view):
                    fresh = again(step - 1)
                kept = self._step(view, fresh, one, step)
            self._kept = None
            kept.provenance |= {"sparsity": str(one.target), "epochs": self.epochs, "schedule": self.schedule}
            yield one.target, kept

    def _step(self, view: PrunableView, statistics: Measured, one: Request, step: int) -> Masks:
        """The masks after a step, 1 .. `epochs`, on the way to a request's sparsity."""
        target = step_sparsity(one.target, step, self.epochs, self.schedule)
        ((_, kept),) = super().masks(view, statistics, replace(one, sparsities=(target,)))
        return kept


def _mask(view: PrunableView, masks: Masks, name: str) -> Tensor:
    weight = view.weights[name]
    return weight.as_matrix(masks[name].to(weight.parameter.device))
