"""Measurements of each layer for allocations, besides statistics of its inputs: the error of its output when it is
pruned, what that does to the model's output, and ECoFLaP's importance.

The Gram matrices of one block are held at a time. All is measured in the model as it is, averaged over ranks, so that
each decides the same, and kept beside the results, so that a run that was killed goes on with the same numbers.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.allocation.base import LAYER_ERRORS, OUTPUT_SENSITIVITY, PROBES, ZEROTH_ORDER
from sparsity.allocation.budget import budget, fraction
from sparsity.allocation.ecoflap import zeroth_order
from sparsity.allocation.error import ladder
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import Block
from sparsity.replay.replayed import Replayed
from sparsity.resume.kept import load_kept, save_kept
from sparsity.run.outcome import alive_of
from sparsity.run.plan import Plan
from sparsity.run.select import Budget
from sparsity.run.sequential import stages
from sparsity.selection import SELECTION, check_finite, keep_exactly, lowered
from sparsity.sensitivity.ladder import LayerError
from sparsity.sensitivity.measured import Sensitivity
from sparsity.sensitivity.outputs import Outputs
from sparsity.statistics.checks import NO_BATCHES
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.hessian import DAMPING
from sparsity.statistics.inputs import widest
from sparsity.statistics.passes import OF_INPUTS
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

BATCHES = 8  # of all ranks together, with which the whole model is run for each layer

Curves = dict[str, dict[Fraction, float]]
Scorer = Callable[[str, Tensor | None], Tensor]  # (name, its prepared statistic) -> scores (out, in)


@dataclass(frozen=True)
class Probing:
    """Measure what the allocation of a plan reads.

    parts: the budgets, whose sparsities are asked for. statistics: of the first pass. before: the masks of the step
    before, which the model has. block: of weights that are pruned as one; layers that it does not divide are in no part
    and are not measured.
    """

    plan: Plan
    view: PrunableView
    reading: CalibrationPass
    parts: Sequence[Budget]
    statistics: Mapping[str, Mapping[str, Tensor]]
    score: Scorer
    seed: int
    before: Masks | None = None
    block: Block | None = None

    @property
    def wanted(self) -> list[str]:
        """Return the names of what is measured."""
        return [name for name in self.plan.allocation.statistics if name in PROBES]

    @property
    def targets(self) -> dict[str, list[Fraction]]:
        """Return name -> the sparsities that are asked of its part, each once."""
        given = {name: shares for part, shares in self.parts for name in part.names}
        return {name: list(dict.fromkeys(map(fraction, given[name]))) for name in self.view.weights if name in given}

    def run(self, origin: Scratch | None) -> Sensitivity:
        """Return what is measured, or what a run that was killed has kept of it beside `origin`."""
        if not self.wanted:
            return Sensitivity()
        if self.reading.batches is None:
            raise UserError(f"--allocation {self.plan.allocation.name} needs calibration data")
        targets = self.targets
        steps = {name: _steps(own) if LAYER_ERRORS in self.wanted else [] for name, own in targets.items()}
        moved = {name: own if OUTPUT_SENSITIVITY in self.wanted else [] for name, own in targets.items()}
        important = list(targets) if ZEROTH_ORDER in self.wanted else []
        asked = [self.wanted, self.plan.name, steps, moved, *([str(self.block)] if self.block else [])]
        store = _Store(origin, json.dumps(asked, default=str), self)
        values = store.load()
        if values is None:
            found = self._measure(targets)
            flat = [found.errors[name][step] for name, own in steps.items() for step in own]
            flat += [found.outputs[name][target] for name, own in moved.items() for target in own]
            values = self._agreed([*flat, *(found.importance[name] for name in important)])
            store.save(values)
        each = iter(values)
        errors = {name: {step: next(each) for step in own} for name, own in steps.items() if own}
        outputs = {name: {target: next(each) for target in own} for name, own in moved.items() if own}
        return Sensitivity(errors, outputs, {name: next(each) for name in important})

    def _measure(self, targets: Mapping[str, list[Fraction]]) -> Sensitivity:
        few = self._few() if {ZEROTH_ORDER, OUTPUT_SENSITIVITY} & set(self.wanted) else []
        importance: dict[str, float] = {}
        if ZEROTH_ORDER in self.wanted:
            reading = self.reading
            with reading.arithmetic():
                found = zeroth_order(self.view, few, reading.generators, seed=self.seed, reduce=reading.reduce)
            importance = {name: float(value) for name, value in found.items()}
        errors, outputs = self._ladders(targets, few) if LAYER_ERRORS in self.wanted else ({}, {})
        return Sensitivity(errors, outputs, importance)

    def _ladders(self, targets: Mapping[str, list[Fraction]], few: Sequence[Any]) -> tuple[Curves, Curves]:
        """Return errors and outputs, of `Sensitivity`, layer by layer."""
        errors: Curves = {}
        outputs: Curves = {}
        before = None
        if OUTPUT_SENSITIVITY in self.wanted:
            with self.reading.arithmetic():
                before = Outputs(self.view, few, self._held)
        batches = max(self._total(len(few)), 1)
        for name, statistics in self._inputs():
            if name not in targets:  # stays dense
                continue
            weight = self.view.weights[name]
            matrix = weight.matrix()
            score = self._scores(name, statistics)
            error = LayerError(name, matrix, statistics["hessian"], solved=self._solved, damp=self._damp)

            def kept(sparsity: Fraction, name: str = name, score: Tensor = score) -> Tensor:
                return self._kept(name, score, sparsity)

            errors[name] = {step: error.on_few_rows(kept(step)) for step in _steps(targets[name])}
            if before is not None:
                outputs[name] = {}
                for target in targets[name]:
                    pruned, lost = error.pruned(kept(target))
                    with self.reading.arithmetic():
                        moved = self._total(before.change(weight, pruned)) / batches
                    outputs[name][target] = moved / lost if lost > 0 else 0.0
        return errors, outputs

    def _kept(self, name: str, score: Tensor, sparsity: Fraction) -> Tensor:
        """Return the method's own mask of a layer alone, bool (out, in), from its scores."""
        block, scope = self.block, self.plan.scope
        if block is None:
            return keep_exactly(name, score, scope, budget(sparsity, score.numel()))
        blocks = block.reduce(score)
        width = SELECTION // block.columns
        return block.expand(keep_exactly(name, blocks, scope, budget(sparsity, blocks.numel()), width))

    def _scores(self, name: str, statistics: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of a layer, (out, in): what was pruned before lies below all others."""
        own = self.plan.statistic or ""
        known = self.statistics.get(own, {})
        if own in statistics:  # of the layer's inputs
            known = self.plan.score.prepare(self.view, {name: statistics[own]})
        found = self.score(name, known.get(name))
        check_finite(name, found)
        return found if self.before is None else lowered(found, alive_of(self.view, self.before, name))

    def _inputs(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Return (name, the statistics of its inputs that it takes) of each layer, block by block."""
        reading, own = self.reading, self.plan.score.statistic
        wanted = ["hessian", *([own] if isinstance(own, str) and own in OF_INPUTS and own != "hessian" else [])]
        with reading.arithmetic():  # of the traced pass
            replayed = Replayed(
                self.view,
                lambda: reading.batches or (),
                stages(self.view),
                progress=reading.progress,
                reduce=reading.reduce,
                dense=True,
                budget=self._held,
                spill=reading.scratch and reading.scratch.path.parent,
                offload=self.plan.offload,
            )
        with replayed:
            for number, names in enumerate(replayed.order):
                logger.info("errors of block %d of %d: %d layers", number + 1, len(replayed.order), len(names))
                with reading.arithmetic():
                    found = replayed.measure(names, wanted)
                for name in names:
                    yield name, {statistic: of_each.pop(name) for statistic, of_each in found.items()}

    @property
    def _held(self) -> int | None:
        """Return how many bytes of captured tensors may be held for the errors; where the model's output is measured,
        too, half of the budget, of which that has the other half.
        """
        budget = self.reading.capture_budget
        return budget // 2 if budget is not None and OUTPUT_SENSITIVITY in self.wanted else budget

    @property
    def _solved(self) -> bool:
        return self.plan.reconstruction is not None

    @property
    def _damp(self) -> float:
        return DAMPING if isinstance(self.plan.damp, str) else self.plan.damp

    def _few(self) -> list[Any]:
        """Return the first batches, which are few: those that one rank alone would have, shared out."""
        few = list(itertools.islice(self.reading.batches or (), -(-BATCHES // round(self._total(1)))))
        if not self._total(len(few)):
            raise UserError(NO_BATCHES)
        return few

    def _total(self, number: float) -> float:
        """Return the sum over ranks."""
        return self._summed([number])[0]

    def _summed(self, numbers: Sequence[float]) -> list[float]:
        device, reduce = self.view.device, self.reading.reduce
        return reduce(torch.tensor(numbers, dtype=widest(device), device=device)).tolist() if reduce else list(numbers)

    def _agreed(self, numbers: Sequence[float]) -> list[float]:
        """Return the means over ranks, which have the same numbers but for their rounding."""
        *totals, ranks = self._summed([*numbers, 1.0])
        return [total / ranks for total in totals]


def _steps(targets: Sequence[Fraction]) -> list[Fraction]:
    """Return the sparsities at which a layer is measured: the ladders of all its targets, without 0."""
    return sorted({step for target in targets for step in ladder(target) if step > 0})


class _Store:
    """A file with what was measured, for a run that is killed. All ranks go on with theirs, or none does."""

    def __init__(self, origin: Scratch | None, asked: str, probing: Probing):
        self._path: Path | None = origin and _beside(origin)
        facts = {name: str(value) for name, value in sorted(_method(probing.plan).items())}
        self._identity = json.dumps([origin and origin.identity, asked, facts, probing.seed])
        self._probing = probing

    def load(self) -> list[float] | None:
        if self._path is None:
            return None
        kept = load_kept(self._path, self._identity)
        ranks, there = self._probing._summed([1.0, float(kept is not None)])
        if kept is None or there < ranks:
            return None
        logger.info("%s: what was measured of each layer is there", self._path)
        return kept[0]["values"].tolist()

    def save(self, values: Sequence[float]) -> None:
        if self._path is not None:
            tensors = {"values": torch.tensor(values, dtype=torch.float64)}
            save_kept(self._path, tensors, {"identity": self._identity})


def _method(plan: Plan) -> dict[str, Any]:
    """Return what decides the masks and the weights of a layer."""
    options = plan.reconstruction.options() if plan.reconstruction else {}
    return {"scope": plan.scope, "reconstruction": plan.reconstruction and plan.reconstruction.name, **options}


def forget(origin: Scratch | None) -> None:
    """Remove what was kept of a measurement."""
    if origin is not None:
        _beside(origin).unlink(missing_ok=True)


def _beside(origin: Scratch) -> Path:
    return origin.path.with_name(f"{origin.path.name}_allocation")
