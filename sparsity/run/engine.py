"""The one engine that runs every plan, in as few passes over the calibration data as the plan allows.

Scores whose statistic comes from one pass serve all sparsities. What depends on what was pruned before (sequential
calibration, reconstruction, steps) is done for each sparsity by itself; blocks and steps that are done are kept beside
the results, so that a run that was killed goes on after them.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.base import PROBES, Part
from sparsity.allocation.budget import Sparsity, budget, step_sparsity
from sparsity.bits import Bits
from sparsity.errors import UserError
from sparsity.masks import Masks, model_digest
from sparsity.pattern import NM, Block
from sparsity.reconstruction.base import WholeModel
from sparsity.resume.start import begun, check_pattern, check_start, lost, nested
from sparsity.resume.steps import Trail
from sparsity.run.layers import Layers
from sparsity.run.memory import Memory, check_memory, demand_of, preflight_bytes
from sparsity.run.outcome import alive_of, as_masks, check_fits, dense_layers, fits, packed, versions
from sparsity.run.plan import Plan
from sparsity.run.probing import Probing, forget
from sparsity.run.request import Request
from sparsity.run.select import Budget, Kept, Quota, check_budgets, chosen_of, follow, parts_of, quotas, shared
from sparsity.run.sequential import Blocks, Solved, forget_blocks, origin_of
from sparsity.selection import Named, lowered
from sparsity.sensitivity.measured import Measured as Measured
from sparsity.statistics.checks import check_weights
from sparsity.statistics.passes import collect
from sparsity.statistics.reading import CalibrationPass, Calibrations, Statistic, Target
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


ANY = Request()  # of which only is known that it has no pattern


class Engine:
    """Runs a plan: `measure`, then `masks`; or `prune`, which is both. The model is left as it was."""

    def __init__(self, plan: Plan):
        self.plan, self.name = plan, plan.name

    def prune(
        self,
        view: PrunableView,
        batches: Iterable[Any] | None,
        sparsities: Sequence[Sparsity] | None,
        *,
        pattern: NM | Block | None = None,
        seed: int = 42,
        groups: Mapping[str, Sparsity] | None = None,
        start: Masks | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        generators: Callable[[int], torch.Generator] | None = None,
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """Return (sparsity, masks) for each sparsity (fractions), or once for a pattern.

        batches: a list, or a loader with a length, where they are read more than once; each step of a plan with several
        reads the same. start: masks that are there already. UserError, before any data is read, for what cannot be.
        """
        request = Request.of(sparsities or (), pattern, seed, groups, start and begun(view, start))
        reading = CalibrationPass(batches, progress, reduce, generators)
        self.preflight(view, request)
        if not (reading.rereadable or self.plan.one_pass):
            raise UserError(f"{self.name} reads the batches more than once: give a list, or a loader with a length")
        yield from self.masks(view, self.measure(view, reading, request), request, lambda epoch: reading)

    def preflight(
        self,
        view: PrunableView,
        request: Request,
        *,
        rounds: Sequence[int] | None = None,
        folder: Path | None = None,
        free: Memory | None = None,
    ) -> None:
        """Raise UserError for what this model cannot have, before any data is read.

        rounds: of the calibration pass. folder: where what is too large for memory would be kept. free: bytes, which
        are then compared with what the plan takes at most.
        """
        plan, held = self.plan, 0
        plan.check(request, view)
        check_weights(view)
        if found := request.pattern or request.block:
            check_fits(view, found)
        if request.pattern:
            if request.start:
                check_pattern(view, request.start, request.pattern)
        else:
            if request.start:
                check_start(request.start, self._parts(view, request))
            check_budgets(self._parts(view, request, before=request.start), request.sparsities, request.groups)
        if isinstance(plan.reconstruction, WholeModel) and rounds is not None:
            held = plan.reconstruction.preflight(view, rounds, folder, plan.steps)
        if free is None:
            return
        demand = demand_of(plan, request, held)
        needed = preflight_bytes(demand, view)
        logger.info("%s needs at most %s, besides the model and its activations", self.name, needed)
        check_memory(needed, free, demand)

    def measure(self, view: PrunableView, reading: CalibrationPass, request: Request = ANY) -> Measured:
        """Return what one pass over the data gives for all sparsities; nothing is read where none serves them all.

        request: with or without a pattern, as the masks are wanted; an allocation may measure layers at its sparsities.
        """
        first = self._at_step(request, 1)
        with request.start.applied(view) if request.start else nullcontext():
            return self._measure(view, reading, first, request.start)

    def _at_step(self, request: Request, step: int) -> Request:
        """Return what is asked of a step, which begins with the masks of the one before."""
        plan = self.plan

        def reached(sparsity: Sparsity) -> Sparsity:
            return step_sparsity(sparsity, step, plan.steps, plan.schedule)

        groups = {group: reached(sparsity) for group, sparsity in request.groups.items()}
        return replace(request, sparsities=tuple(map(reached, request.sparsities)), groups=groups)

    def _measure(
        self, view: PrunableView, reading: CalibrationPass, request: Request, before: Masks | None
    ) -> Measured:
        """Return what is measured for one step. before: the masks of the step before, which the model has."""
        plan, solver = self.plan, self.plan.reconstruction
        if plan.statistics and reading.batches is None:
            raise UserError(f"pruner {self.name!r} needs calibration data")
        origin = origin_of(view, reading) if plan.resumes else None
        if isinstance(solver, WholeModel):
            with reading.arithmetic():
                return Measured(whole=solver.measure(view, reading, plan.steps), origin=origin)
        wanted = [] if request.pattern else [name for name in plan.allocation.statistics if name not in PROBES]
        alone = plan.by_blocks(request) or (plan.joint(request) and plan.local(request))
        if isinstance(plan.score.statistic, str) and not alone:
            wanted.insert(0, plan.score.statistic)
        found = Measured(self._collect(view, wanted, reading), origin=origin)
        if plan.probes and not request.pattern:
            parts, score = self._parts(view, request, before=before), partial(self._score, view, seed=request.seed)
            probing = Probing(plan, view, reading, parts, found.statistics, score, request.seed, before, request.block)
            found.sensitivity = probing.run(origin)
            found.statistics |= found.sensitivity.statistics
        return found

    def _collect(
        self, view: PrunableView, wanted: Sequence[str], reading: CalibrationPass
    ) -> dict[str, Mapping[str, Tensor]]:
        """Statistics of all layers; those of the score as the score needs them."""
        if not wanted:
            return {}
        with reading.arithmetic():
            found: dict[str, Mapping[str, Tensor]] = collect(
                view,
                list(dict.fromkeys(wanted)),
                reading.over(),
                reduce=reading.reduce,
                generators=reading.generators,
                offload=self.plan.offload,
                announced=None if reading.rounds is None else sum(reading.rounds),
            )
        own = self.plan.statistic
        return found | ({own: self.plan.score.prepare(view, found[own])} if own in found else {})

    def scores(
        self, view: PrunableView, measured: Measured, *, seed: int = 42, names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Return (name, score (out, in)) of all weights, or of `names`, one at a time and in order."""
        known = measured.statistics.get(self.plan.statistic or "", {})
        for name in view.weights if names is None else names:
            yield name, self._score(view, name, known.get(name), seed)

    def _score(self, view: PrunableView, name: str, statistic: Tensor | None, seed: int) -> Tensor:
        weight = view.weights[name].matrix()
        if statistic is None and self.plan.score.statistic is not None:
            raise UserError(f"{self.name} learns other scores for each target: there are none that serve all")
        on_device = None if statistic is None else statistic.to(weight.device)
        return self.plan.score.score(weight, on_device, generator_of(seed, name))

    def masks(
        self,
        view: PrunableView,
        measured: Measured,
        request: Request,
        calibrations: Calibrations | None = None,
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """Return (sparsity, masks) for each sparsity, or once for a pattern.

        measured: from `measure`. calibrations: the passes of the epochs, for plans that read more than once.
        """
        plan = self.plan
        plan.check(request)
        record = {"model": model_digest(view), "versions": versions(), **plan.facts(request)}
        if found := request.pattern or request.block:
            record["dense_layers"] = dense_layers(view, found)
        if plan.scored and not plan.refines and request.start is None:
            yield from self._at_once(view, measured, request, record)
            return
        trails = []
        for one in request.each():
            facts = record | {"sparsity": str(one.target)}
            if isinstance(plan.reconstruction, WholeModel):
                facts |= plan.reconstruction.facts(measured.whole)
            trails.append(Trail(measured.origin if plan.steps > 1 else None, facts))
            yield one.target, self._in_steps(view, measured, one, calibrations, facts, trails[-1])
            forget_blocks(measured.origin)
        for trail in trails:
            trail.forget()
        forget(measured.origin)
        if isinstance(plan.reconstruction, WholeModel):
            plan.reconstruction.forget(measured.whole)

    def _at_once(
        self, view: PrunableView, measured: Measured, request: Request, record: Mapping[str, Any]
    ) -> Iterator[tuple[Sparsity, Masks]]:
        """Masks for all sparsities from one set of scores."""
        requests = request.each()
        found: list[dict[str, Bits]] = [{} for _ in requests]
        for name, of_each in self._select(view, self._scores_of(view, measured, request.seed), request, measured):
            for bits, kept in zip(found, of_each, strict=True):
                bits[name] = packed(view, name, kept)
        for one, bits in zip(requests, found, strict=True):
            yield one.target, as_masks(view, bits, {**record, "sparsity": str(one.target)})
        forget(measured.origin)

    def _scores_of(
        self, view: PrunableView, measured: Measured, seed: int, before: Masks | None = None
    ) -> Callable[[Sequence[str]], Named]:
        """Return what computes scores by name, again at each pass. before: masks of the step before, which stay."""

        def computed(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
            for name, score in self.scores(view, measured, seed=seed, names=names):
                yield name, score if before is None else lowered(score, alive_of(view, before, name))

        return computed

    def _select(
        self,
        view: PrunableView,
        scores: Callable[[Sequence[str]], Named],
        request: Request,
        measured: Measured,
        before: Masks | None = None,
    ) -> Kept:
        """Return (name, what is kept for each sparsity, or the one pattern), by scores of the whole model."""
        if request.pattern:
            return ((name, [kept]) for name, kept in follow(request.pattern, scores(list(view.weights))))
        parts = self._parts(view, request, scores, measured, before)
        contests = shared(parts, self.plan.allocation)
        return chosen_of(view, contests, self.plan.scope, request.block, len(request.sparsities))

    def _parts(
        self,
        view: PrunableView,
        request: Request,
        scores: Callable[[Sequence[str]], Named] | None = None,
        measured: Measured | None = None,
        before: Masks | None = None,
    ) -> list[Budget]:
        """Return the parts that have budgets, with the sparsities of each, at least what is pruned before. Layers that
        do not divide into the blocks that are pruned are in none.
        """
        plan, found = self.plan, measured or Measured()
        pruned = {name: lost(mask) for name, mask in (before or {}).items()}
        error = found.sensitivity.error if found.sensitivity.errors else None
        moved = found.sensitivity.output if found.sensitivity.outputs else None
        facts = (found.statistics, error, moved, pruned, plan.min_keep, plan.max_keep)
        names = [name for name, weight in view.weights.items() if fits(request.block, weight.shape)]
        whole = Part(view, names, scores or self._no_scores, *facts)
        return parts_of(whole, request.sparsities, request.groups, within_groups=plan.within == "group")

    @staticmethod
    def _no_scores(names: Sequence[str]) -> Named:
        raise AssertionError("budgets look at sizes alone")

    def _in_steps(
        self,
        view: PrunableView,
        measured: Measured,
        one: Request,
        calibrations: Calibrations | None,
        facts: Mapping[str, Any],
        trail: Trail,
    ) -> Masks:
        """The masks for one target, step by step: each step sees the model that the one before has left."""
        plan = self.plan
        if calibrations is None and plan.statistics and (plan.steps > 1 or not plan.whole):
            raise UserError(f"{self.name} reads the batches again: give what they are read from")
        done, masks = trail.load(view)
        masks = masks or one.start
        for step in range(done + 1, plan.steps + 1):
            target = self._at_step(one, step)
            with masks.applied(view) if masks else nullcontext():
                reading = calibrations(step - 1) if calibrations else CalibrationPass()
                fresh = measured if step == 1 else self._measure(view, reading, target, masks)
                masks = self._step(view, fresh, target, reading, masks, {**facts, "step": step})
            masks = nested(masks, one.start, view) if one.start else masks
            masks.provenance.pop("step")
            trail.save(step, masks)
            forget(fresh.origin if step > 1 else None)
            if step > 1 and isinstance(plan.reconstruction, WholeModel):
                plan.reconstruction.forget(fresh.whole)
        assert masks is not None, "there is at least one step"
        return masks

    def _step(
        self,
        view: PrunableView,
        measured: Measured,
        target: Request,
        reading: CalibrationPass,
        before: Masks | None,
        facts: Mapping[str, Any],
    ) -> Masks:
        """The masks of one step, with updated weights where the plan reconstructs."""
        plan = self.plan
        if isinstance(plan.reconstruction, WholeModel):
            return self._solve_all(plan.reconstruction, view, measured, target, reading, before, facts)
        statistic = plan.score.statistic
        if statistic is not None and not isinstance(statistic, str):
            measured = replace(measured, statistics=self._learned(view, measured, statistic, target, reading, before))
        layers = Layers(plan, view, target, reading, measured.origin, facts, before)
        if plan.allocation.local and not target.pattern:
            contests = shared(self._parts(view, target, None, measured, before), plan.allocation)
            layers.quotas = quotas(contests, plan.scope, target.block)
        if plan.by_blocks(target) or (plan.joint(target) and plan.local(target)):
            return layers.run(lambda name, found: self._score(view, name, found, target.seed))
        scores = self._scores_of(view, measured, target.seed, before)
        selected = self._select(view, scores, target, measured, before)
        if plan.joint(target):  # scores say how many weights each layer loses, the reconstruction which
            unit = target.block.numel if target.block else 1
            counts = ((name, lost(kept) // unit) for name, (kept,) in selected)
            layers.quotas = {name: Quota(count, None, plan.scope) for name, count in counts}
            return layers.run(None)
        masks = as_masks(view, {name: packed(view, name, kept) for name, (kept,) in selected}, facts)
        return layers.run(None, masks) if plan.refines else masks

    def _learned(
        self,
        view: PrunableView,
        measured: Measured,
        statistic: Statistic,
        target: Request,
        reading: CalibrationPass,
        before: Masks | None,
    ) -> dict[str, Mapping[str, Tensor]]:
        """Return what is measured, with the statistic that is learned for one target."""

        # While scores are learned the model's weights are masked ones: what each layer loses is decided before.
        parts = [] if target.pattern else self._parts(view, target, None, measured, before)
        contests = shared(parts, self.plan.allocation)

        def choose(scores: Callable[[Sequence[str]], Named]) -> Named:
            if target.pattern:
                return follow(target.pattern, scores(list(view.weights)))
            contested = [(replace(part, scores=scores), contest, shares) for part, contest, shares in contests]
            return ((name, kept) for name, (kept,) in chosen_of(view, contested, self.plan.scope, target.block))

        with reading.arithmetic():
            learned = statistic.collect(view, reading, Target(target.target, target.pattern, choose))
        return {**measured.statistics, statistic.name: learned}

    def _solve_all(
        self,
        solver: WholeModel,
        view: PrunableView,
        measured: Measured,
        target: Request,
        reading: CalibrationPass,
        before: Masks | None,
        facts: Mapping[str, Any],
    ) -> Masks:
        """The masks of a reconstruction that solves all layers together."""
        alive = before and {name: alive_of(view, before, name) for name in view.weights}
        pruned = 0 if target.pattern else max(budget(target.target, view.numel), sum(map(lost, (alive or {}).values())))
        done = Blocks(view, folder=reading.scratch and reading.scratch.path.parent)
        for number, (name, *solved) in enumerate(solver.solve_all(view, measured.whole, pruned, target.pattern, alive)):
            done.save(number, {name: Solved(solved[0], solved[1])})
        masks = as_masks(view, done.kept, facts, done.updates)
        done.forget()
        return masks


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a stream of random numbers for a layer, that depends on nothing but the seed and the layer's name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
