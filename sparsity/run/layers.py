"""Plans that prune layer by layer, each from statistics of its own inputs, in the order of the blocks."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.reconstruction.base import Problem
from sparsity.reconstruction.bias import bias_change, centred
from sparsity.reconstruction.block_steps import train
from sparsity.reconstruction.equations import equations
from sparsity.reconstruction.errors import layer_errors
from sparsity.replay.replayed import Replayed
from sparsity.run.outcome import alive_of, as_masks, fits
from sparsity.run.plan import Plan
from sparsity.run.request import Request
from sparsity.run.select import Quota
from sparsity.run.sequential import Blocks, PrunedStages, Solved, biases_of, by_blocks, stages
from sparsity.selection import check_finite, keep_pattern, lowered
from sparsity.solvers.share import Share
from sparsity.solvers.swaps import swap
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.hessian import DAMPING
from sparsity.statistics.passes import OF_INPUTS
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

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
        biases = Counter(
            id(bias) for w in view.weights.values() for bias in {id(b): b for b in w.biases.values()}.values()
        )
        self._corrected = {
            name
            for name, weight in view.weights.items()
            if weight.biases and all(biases[id(bias)] == 1 for bias in weight.biases.values())
        }

    def run(self, score: Scorer | None, chosen: Masks | None = None) -> Masks:
        """Return the masks, with updated weights where the plan reconstructs.

        chosen: masks that are there already; else they are chosen by `score`, or by the reconstruction.
        """
        label = str(self.target.pattern or self.target.target).replace(":", "of").replace("/", "over")
        label += f"_step{self.facts['step']}" if self.plan.steps > 1 else ""
        method = [self.facts, chosen and chosen.digest(), {name: str(quota) for name, quota in self.quotas.items()}]
        folder, reduce = self.reading.scratch and self.reading.scratch.path.parent, self.reading.reduce
        done = Blocks(self.view, self.origin, folder=folder, label=label, method=method, reduce=reduce)
        with self._replayed(folder) as replayed, PrunedStages(self.view, replayed.order, done) as put:
            replayed.put = put if self.plan.sequential else None
            share = Share(*self.reading.place, reduce, self.view.device)
            prune = partial(self._prune_layer, score, chosen)
            train = None
            if self.plan.block_steps:
                self._check_replay(replayed)
                train = partial(self._train, replayed)
            by_blocks(replayed.order, partial(self._measure, replayed), prune, done, share, train)
        masks = as_masks(self.view, done.kept, self.facts, done.updates, biases=done.biases, errors=done.errors)
        if self.origin is None or self.plan.steps > 1:  # else they stay until the results of this target are written
            done.forget()
        return masks

    def _replayed(self, folder: Path | None) -> Replayed:
        """Return what measures one block after another. folder: of captured calls that are too large for memory."""
        reading, plan = self.reading, self.plan
        view = self.view.in_full() if plan.reconstruction or plan.block_steps else self.view
        with reading.arithmetic():  # of the traced pass
            return Replayed(
                view,
                lambda: reading.batches or (),
                stages(view),
                progress=reading.progress,
                reduce=reading.reduce,
                dense=not plan.sequential,
                divided=plan.calibrate_within == "stage",
                budget=reading.capture_budget,
                spill=folder,
                offload=plan.offload,
                both=plan.dense_share > 0 or plan.block_steps > 0,
                outputs=plan.block_steps > 0,
            )

    def _check_replay(self, replayed: Replayed) -> None:
        """Raise UserError, on all ranks, where blocks cannot be run by themselves on one of them."""
        if self._everywhere(replayed.unfit is None):
            return
        why = replayed.unfit or "on another process"
        raise UserError(
            f"--block_steps: the blocks of this model cannot be run by themselves ({why}): leave it out, and train what"
            " is kept with prune.py --recover"
        )

    def _everywhere(self, fact: bool) -> bool:
        """Return whether a fact holds on all ranks."""
        reduce = self.reading.reduce
        found = torch.tensor([int(fact), 1], device=self.view.device)
        holds, ranks = (found if reduce is None else reduce(found)).tolist()
        return holds == ranks

    def _train(self, replayed: Replayed, block: dict[str, Solved]) -> tuple[dict[str, Solved], dict[str, Tensor]]:
        """Return what the layers of a stage become after block steps, and key -> what its biases and norms become."""
        plan, reading, weights = self.plan, self.reading, self.view.weights
        starts = {
            n: each.kept * weights[n].matrix() if each.updated is None else each.updated for n, each in block.items()
        }
        block = {name: each._replace(updated=starts[name]) for name, each in block.items()}
        with reading.arithmetic(), replayed.uses(list(block), plan.block_window) as found:
            if not self._everywhere(bool(found.parameters)):
                logger.info("no block steps for the layers from %s on: in no block that runs alone", next(iter(block)))
                return block, {}
            values = {name: weights[name].as_stored(start) for name, start in starts.items()}
            values |= biases_of(self.view, block)
            kept = {name: weights[name].as_stored(each.kept) for name, each in block.items()}
            with _holding(found.parameters | self.view.parameters, values, found.parameters):
                rounds = reading.rounds or [1] * len(found.uses)
                numbers = [number for number, count in enumerate(rounds) for _ in range(count)]
                uses = list(zip(numbers, found.uses, strict=True))
                trained = train(
                    uses, found.parameters, kept, plan.block_steps, rounds=len(rounds), reduce=reading.reduce
                )
        told = trained.before, trained.after, trained.step, plan.block_steps
        logger.info("block steps: held-out error %.4g -> %.4g, after step %d of %d", *told)
        new = trained.values or {}
        updated = {n: each._replace(updated=weights[n].as_matrix(new[n])) for n, each in block.items() if n in new}
        prunable = {alias for name in block for alias in weights[name].aliases}
        others = {id(found.parameters[key]): value for key, value in new.items() if key not in prunable}
        named = ((key, others.get(id(parameter))) for key, parameter in self.view.parameters.items())
        return block | updated, {key: value.clone() for key, value in named if value is not None}

    def _measure(self, replayed: Replayed, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Name of a statistic -> name of a weight -> tensor, of a block in the model as it is."""
        pattern = self.target.pattern
        fitting = [name for name in names if fits(pattern or self.target.block, self.view.weights[name].shape)]
        wanted = [statistic for statistic in self.plan.statistics if statistic in OF_INPUTS]
        if not fitting:
            return {}
        with self.reading.arithmetic():
            return replayed.measure(names, wanted, fitting)

    def _prune_layer(
        self, score: Scorer | None, chosen: Masks | None, name: str, statistics: Mapping[str, Tensor]
    ) -> Solved:
        """Return what a layer becomes: its mask, refined by exchanges, and its updated weights and biases."""
        solver, pattern, weight = self.plan.reconstruction, self.target.pattern, self.view.weights[name].matrix()
        if not fits(pattern or self.target.block, weight.shape):
            return Solved(torch.ones_like(weight, dtype=torch.bool), weight.clone() if solver else None)
        kept = alive_of(self.view, chosen, name) if chosen else None
        if kept is None and not self.plan.joint(self.target):
            kept = self._choose(score, name, statistics)
        plain = self._problem(name, weight, dict(statistics), kept)
        centring = self.plan.correct_bias and name in self._corrected
        problem = replace(plain, statistics=centred(statistics)) if centring else plain
        if self.plan.swaps:
            problem = replace(problem, kept=self._swapped(problem))
        if solver is None:
            assert problem.kept is not None, "without a reconstruction a mask is chosen by scores"
            return Solved(problem.kept)
        kept, updated = solver.solve(problem)
        errors = layer_errors(plain, problem, kept, updated, self.plan.damp).tensor()
        if not centring:
            return Solved(kept, updated, errors=errors)
        means = [statistics[each].to(weight.device) for each in ("input_means", "dense_means") if each in statistics]
        return Solved(kept, updated, bias_change(weight, updated, *means), errors)

    def _swapped(self, problem: Problem) -> Tensor:
        """Return the mask of a problem after exchanges; where it has none, of the one that the reconstruction finds."""
        kept, solver = problem.kept, self.plan.reconstruction
        if kept is None:
            assert solver is not None, "masks are chosen by scores, or by the reconstruction"
            kept, _ = solver.solve(problem)
        layer = equations(replace(problem, dense_share=0.0))
        damp = DAMPING if isinstance(self.plan.damp, str) else self.plan.damp
        alive = None if self.before is None else alive_of(self.view, self.before, problem.name)
        return swap(layer.weight, layer.matrix(layer.ridge(damp)), kept, self.plan.swaps, problem.pattern, alive)

    def _problem(self, name: str, weight: Tensor, statistics: dict[str, Tensor], kept: Tensor | None) -> Problem:
        """Return what the reconstruction solves. kept: (out, in), bool; None where it finds the mask."""
        known = {"scope": self.plan.scope, "dense_share": self.plan.dense_share}
        known |= {"pattern": self.target.pattern, "block": self.target.block}
        problem = Problem(name, weight, statistics, kept, **known)
        if kept is not None:
            return problem
        quota = self.quotas.get(name)
        if quota is not None:
            problem = replace(problem, sparsity=quota.share, count=quota.count if quota.share is None else None)
        return problem if self.before is None else replace(problem, alive=alive_of(self.view, self.before, name))

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
            return block.expand(self.quotas[name].keep(name, block.reduce(found)))
        return self.quotas[name].keep(name, found)


@contextmanager
def _holding(
    known: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], written: Collection[str]
) -> Iterator[None]:
    """Parameters hold these values, and those that are written to storage of their own; afterwards all their own.

    known: key -> parameter.
    """
    held = [(known[key], known[key].data) for key in dict.fromkeys([*values, *written])]
    try:
        for (parameter, data), key in zip(held, dict.fromkeys([*values, *written]), strict=True):
            parameter.data = values.get(key, data).to(data).clone(memory_format=torch.contiguous_format)
        yield
    finally:
        for parameter, data in reversed(held):
            parameter.data = data
