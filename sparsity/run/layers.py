"""Plans that prune layer by layer, each from statistics of its own inputs, in the order of the blocks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsity.masks import Masks
from sparsity.reconstruction.base import Problem
from sparsity.replay.replayed import Replayed
from sparsity.run.outcome import alive_of, as_masks, fits
from sparsity.run.plan import Plan
from sparsity.run.request import Request
from sparsity.run.select import Quota
from sparsity.run.sequential import Progress, by_blocks, stages
from sparsity.selection import check_finite, keep_pattern, lowered
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.passes import OF_INPUTS
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

Scorer = Callable[[str, Tensor | None], Tensor]  # (name, its prepared statistic) -> scores (out, in)


class Layers:
    """One set of masks, block by block.

    before: the masks of the step before, whose zeros stay. facts: the provenance of the masks. quotas: how much each
    layer loses, where that is known before it is scored.
    """

    def __init__(
        self,
        plan: Plan,
        view: PrunableView,
        target: Request,
        reading: CalibrationPass,
        origin: Scratch | None,
        facts: Mapping[str, Any],
        before: Masks | None = None,
    ):
        self.plan, self.view, self.target, self.reading = plan, view, target, reading
        self.facts, self.before, self.origin = facts, before, origin
        self.quotas: Mapping[str, Quota] = {}

    def run(self, score: Scorer | None, kept: Mapping[str, Tensor] | None = None) -> Masks:
        """Return the masks, with updated weights where the plan reconstructs.

        kept: name -> bool (out, in), where masks are there already; else they are chosen by `score`, or by the
        reconstruction.
        """
        label = str(self.target.pattern or self.target.target).replace(":", "of").replace("/", "over")
        label += f"_step{self.facts['step']}" if self.plan.steps > 1 else ""
        method = [self.facts, kept and Masks({name: mask.cpu() for name, mask in kept.items()}).digest()]
        progress = Progress(self.origin, self.reading.reduce, label, method, self.view.device)
        prune = partial(self._prune_layer, score, kept or {})
        with self._replayed() as replayed:
            measure = partial(self._measure, replayed)
            how = {"sequential": self.plan.sequential, "order": replayed.order}
            done = by_blocks(self.view, measure, prune, progress, **how)
        updated = {name: what.updated for name, what in done.items() if what.updated is not None}
        masks = as_masks(self.view, {name: what.kept for name, what in done.items()}, self.facts, updated)
        progress.forget()
        return masks

    def _replayed(self) -> Replayed:
        """Return what measures one block after another."""
        reading, plan = self.reading, self.plan
        with reading.arithmetic():  # of the traced pass
            return Replayed(
                self.view,
                lambda: reading.batches or (),
                stages(self.view),
                progress=reading.progress,
                reduce=reading.reduce,
                dense=not plan.sequential,
                budget=reading.capture_budget,
                spill=reading.scratch and reading.scratch.path.parent,
                offload=plan.offload,
            )

    def _measure(self, replayed: Replayed, names: list[str]) -> dict[str, dict[str, Tensor]]:
        """Name of a statistic -> name of a weight -> tensor, of a block in the model as it is."""
        pattern = self.target.pattern
        fitting = [name for name in names if fits(pattern or self.target.block, self.view.weights[name].shape)]
        wanted = [statistic for statistic in self.plan.statistics if statistic in OF_INPUTS]
        if not fitting:
            return {}
        with self.reading.arithmetic():
            return replayed.measure(names, wanted, fitting)

    def _prune_layer(
        self,
        score: Scorer | None,
        kept: Mapping[str, Tensor],
        name: str,
        weight: Tensor,
        statistics: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Return what is kept of a layer, (out, in) bool, and what it becomes."""
        solver, pattern = self.plan.reconstruction, self.target.pattern
        if not fits(pattern or self.target.block, weight.shape):
            return torch.ones_like(weight, dtype=torch.bool), weight.clone() if solver else None
        chosen = kept.get(name)
        if chosen is None and not self.plan.joint(self.target):
            chosen = self._choose(score, name, statistics)
        if solver is None:
            assert chosen is not None, "without a reconstruction a mask is chosen by scores"
            return chosen, None
        sparsity = self.quotas[name].share if name in self.quotas else None
        how = {"scope": self.plan.scope, "pattern": pattern, "block": self.target.block}
        return solver.solve(Problem(name, weight, dict(statistics), chosen, sparsity, **how))

    def _choose(self, score: Scorer | None, name: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return what the scores of one layer keep of it."""
        assert score is not None, "there are scores, or masks"
        own = self.plan.score.statistic
        prepared = self.plan.score.prepare(self.view, {name: statistics[own]})[name] if isinstance(own, str) else None
        found = score(name, prepared)
        check_finite(name, found)
        if self.before is not None:
            found = lowered(found, alive_of(self.view, self.before, name))
        if self.target.pattern:
            return keep_pattern(self.target.pattern, name, found)
        if block := self.target.block:
            return block.expand(self.quotas[name].keep(name, block.reduce(found), self.plan.scope))
        return self.quotas[name].keep(name, found, self.plan.scope)
