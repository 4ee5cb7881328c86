"""Gradual pruning: which mask a model in training gets before a step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from engine.options.sparse_training import SCORES, GradualOptions
from engine.sparse_training.schedule import Schedule
from sparsity.allocation.base import Part
from sparsity.allocation.budget import budget, fraction
from sparsity.bits import Bits
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.run.axes import ALLOCATIONS
from sparsity.run.select import count_of, select
from sparsity.selection import keep_pattern, lowered
from sparsity.view import PrunableView

Magnitudes = Callable[[str], Tensor]  # name of a weight -> |W|, (out, in)


class Gradual:
    """The masks of a run: the smallest weights are pruned, more and more of them.

    start: the mask that the run begins with; None: dense. steps: of the run. Each mask is nested in the one before,
    unless weights may return. Of equal magnitudes the first are pruned, as in prune.py. UserError where the start is
    sparser than the target.
    """

    def __init__(self, options: GradualOptions, view: PrunableView, start: Masks | None, steps: int, seed: int):
        self.options, self.view, self._start, self._seed = options, view, start, seed
        self.schedule = Schedule.of(steps, options.start, options.until, options.every)
        gone = 0 if start is None else sum(count_of(~mask) for mask in start.resolve(view).values())
        self.before = Fraction(gone, view.numel)
        target = options.target
        self.target = target.sparsity if isinstance(target, NM) else fraction(target)
        if not isinstance(target, NM) and budget(self.target, view.numel) < gone:
            raise UserError(
                f"--gradual {100 * float(self.target):g}: the mask prunes {100 * float(self.before):.4g} % already"
            )

    def masks(self, step: int, magnitudes: Magnitudes, now: Masks | None) -> Masks:
        """Return the mask of a step that is due: exactly floor(s_t n) of n weights are pruned, or floor(s_t M) of each
        M. now: the mask that the model has.
        """
        sparsity = self.schedule.sparsity(step, self.before, self.target)
        alive = None if now is None or self.options.regrow else now.resolve(self.view)
        kept = dict(self._chosen(sparsity, magnitudes, alive or {}))
        stored = {name: weight.as_stored(kept[name]) for name, weight in self.view.weights.items()}
        return self.made(stored)

    def made(self, masks: Mapping[str, Tensor] | Mapping[str, Bits]) -> Masks:
        """Return masks with what is known of where they are from."""
        return Masks(masks, self._provenance(), self.view.aliases)

    def _chosen(
        self, sparsity: Fraction, magnitudes: Magnitudes, alive: dict[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield name and what is kept, bool (out, in)."""
        weights, target = self.view.weights, self.options.target
        before = {name: weights[name].as_matrix(mask) for name, mask in alive.items()}

        def scores(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
            for name in names:
                score = magnitudes(name)
                yield name, lowered(score, before[name].to(score.device)) if name in before else score

        if isinstance(target, NM):
            groups = NM(target.m - int(sparsity * target.m), target.m)
            for name, score in scores(list(weights)):
                kept = keep_pattern(groups, name, score) if groups.n < groups.m else torch.ones_like(score).bool()
                yield name, kept & before[name].to(kept.device) if name in before else kept
            return
        pruned = {name: count_of(~mask) for name, mask in before.items()}
        part = Part(self.view, list(weights), scores, pruned=pruned)
        for name, (kept,) in select([(part, [sparsity])], ALLOCATIONS.find(SCORES[self.options.score])(), "layer"):
            yield name, kept

    def _provenance(self) -> dict[str, Any]:
        target, course = self.options.target, self.schedule
        kind = {"pattern": str(target)} if isinstance(target, NM) else {"sparsity": str(target)}
        way = vars(course) | {"regrow": self.options.regrow, "before": float(self.before)}
        start = {} if self._start is None else {"start": self._start.provenance}
        return {"pruner": self.options.score, **kind, "seed": self._seed, "gradual": way, **start}
