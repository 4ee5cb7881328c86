"""A plan: one value on each of six axes (score, allocation, scope, pattern, reconstruction, schedule).

A pruner is a score and a preset of the other axes, any of which can be given instead. The pattern, and how much is
pruned, come with the request. What cannot be combined is refused here, before any model or data is loaded.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparsity.allocation.base import PROBES, Allocation
from sparsity.allocation.budget import Sparsity, check_schedule, fraction
from sparsity.allocation.given import Given
from sparsity.errors import UserError
from sparsity.reconstruction.base import Reconstruction
from sparsity.reconstruction.block_steps import check_steps
from sparsity.reconstruction.damping import AUTO, Damp
from sparsity.run.axes import (
    ALLOCATIONS,
    CALIBRATED_WITHIN,
    CALIBRATIONS,
    POOLS,
    RECONSTRUCTIONS,
    SCOPES,
    WINDOWS,
    WITHIN,
    dense_share,
)
from sparsity.run.registry import options_of, unread
from sparsity.run.request import Request
from sparsity.run.select import check_allocation, check_block_steps, check_blocks, check_target
from sparsity.solvers.swaps import check_swaps
from sparsity.statistics.hessian import DAMPING
from sparsity.statistics.passes import OF_INPUTS
from sparsity.statistics.reading import Statistic
from sparsity.view import PrunableView

NONE = "none"  # the reconstruction that leaves the kept weights as they are


class Score(Protocol):
    """A pruner: how a weight is judged, and which values of the other axes go with that (see `pruners.base`)."""

    name: ClassVar[str]
    statistic: str | Statistic | None
    allocation: ClassVar[str]
    scope: ClassVar[str]
    reconstruction: ClassVar[str]
    solver: ClassVar[str | None]
    calibration: ClassVar[str]
    draws: ClassVar[bool]
    in_steps: ClassVar[bool]

    def score(self, weight: Tensor, statistic: Any, generator: torch.Generator) -> Tensor: ...

    def prepare(self, view: PrunableView, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Plan:
    """One value on each axis, but for how much is pruned. Made by `make_plan`.

    calibration: "dense": layers see the inputs that the dense model gives them. "sequential": block by block, those
    that the already pruned blocks before them give; calibrate_within "stage": and, within a block, the already pruned
    layers before them, one measurement for those that read the same input. steps, schedule: the sparsity is reached in
    so many steps, each on fresh statistics of the model that the step before has left. offload: what is added up is
    kept on the host. within: "model", or "group": each modality loses the same share, which the allocation spreads
    inside it. min_keep, max_keep: fractions of each layer that must, and that may, be kept. preset: what the provenance
    of masks says of the preset that stood for this plan.

    dense_share: a of the target "dense:a", the share of the output that a reconstruction aims at which is the dense
    model's. correct_bias: biases keep the mean output of layers. swaps: rounds of exchanges that refine each mask.
    layer_errors: also those errors of layers are measured that cost sums of their own. block_steps: of training of each
    block once its layers are pruned, of which block_window says which train.
    """

    score: Score
    allocation: Allocation
    scope: str
    reconstruction: Reconstruction | None = None
    calibration: str = "dense"
    calibrate_within: str = "block"
    steps: int = 1
    schedule: str = "exp"
    offload: bool = False
    within: str = "model"
    min_keep: Sparsity = 0
    max_keep: Sparsity = 1
    dense_share: float = 0.0
    correct_bias: bool = False
    swaps: int = 0
    layer_errors: bool = False
    block_steps: int = 0
    block_window: str = "block"
    preset: str | None = None

    @property
    def name(self) -> str:
        """Return the name of the pruner."""
        return self.score.name

    @property
    def whole(self) -> bool:
        """Whether the reconstruction solves all layers together, and chooses what is pruned."""
        return self.reconstruction is not None and self.reconstruction.whole

    @property
    def statistic(self) -> str | None:
        """Return the name of the statistic of the score."""
        own = self.score.statistic
        return own if own is None or isinstance(own, str) else own.name

    @property
    def statistics(self) -> list[str]:
        """Return the names of all statistics that are read from calibration data."""
        solver = self.reconstruction
        of_score = [] if self.statistic is None or self.whole else [self.statistic]
        both = [*of_score, *self.allocation.statistics, *(solver.statistics if solver else ()), *self._of_refinement]
        return list(dict.fromkeys(both))

    @property
    def _of_refinement(self) -> list[str]:
        """The statistics that options of the reconstruction, and exchanges, need beside its own."""
        found = ["hessian"] if self.swaps else []
        if self.dense_share:
            found += ["cross"] + (["dense_hessian"] if self.layer_errors else [])
        if self.correct_bias:
            found += ["input_means"] + (["dense_means"] if self.dense_share else [])
        if self.damp == AUTO or self.layer_errors:
            found += ["training", "held_out"] + (["training_means", "held_out_means"] if self.correct_bias else [])
        return found

    @property
    def damp(self) -> Damp:
        """Return the damping of the Gram matrices of layers."""
        return self.reconstruction.options().get("damp", DAMPING) if self.reconstruction else DAMPING

    @property
    def refines(self) -> bool:
        """Whether layers are worked on one by one once there are scores: their weights, or their masks."""
        return self.reconstruction is not None or self.swaps > 0 or self.block_steps > 0

    @property
    def of_inputs(self) -> bool:
        """Whether anything is read from the inputs of layers."""
        return any(name in OF_INPUTS for name in self.statistics)

    @property
    def sequential(self) -> bool:
        """Whether blocks are calibrated on what the pruned blocks before them put out."""
        return self.calibration == "sequential"

    @property
    def learned(self) -> bool:
        """Whether scores are learned for each target anew."""
        return not isinstance(self.score.statistic, str | None)

    @property
    def scored(self) -> bool:
        """Whether single weights have scores, which serve all sparsities."""
        return not (self.whole or self.learned or self.steps > 1 or (self.sequential and self._scores_inputs))

    @property
    def one_pass(self) -> bool:
        """Whether one pass over the data, or none, serves all sparsities."""
        return self.scored and not self.refines and not self.probes

    @property
    def probes(self) -> bool:
        """Whether the allocation measures layers by forward passes of their own."""
        return any(name in PROBES for name in self.allocation.statistics)

    @property
    def bounds(self) -> dict[str, Any]:
        """Return the options that bound what layers and modalities lose, those that are given."""
        usual = {"allocation_within": "model", "min_keep": 0, "max_keep": 1}
        given = zip(usual.items(), (self.within, self.min_keep, self.max_keep), strict=True)
        return {option: value for (option, default), value in given if value != default}

    @property
    def resumes(self) -> bool:
        """Whether steps or blocks that are done are kept for a run that is killed."""
        return self.steps > 1 or self.probes or (not self.whole and (self.sequential or self.refines))

    @property
    def _scores_inputs(self) -> bool:
        return isinstance(self.score.statistic, str) and self.score.statistic in OF_INPUTS

    def local(self, request: Request) -> bool:
        """Return whether what a layer loses does not depend on the others: a pattern, or a share of each layer."""
        return request.pattern is not None or self.allocation.local

    def by_blocks(self, request: Request) -> bool:
        """Return whether weights are scored block by block, on the inputs that pruned blocks give."""
        return self.sequential and self._scores_inputs and self.local(request)

    def joint(self, request: Request) -> bool:
        """Return whether the reconstruction finds the mask together with the weights, in place of the score.

        One that projects does so always: where layers compete, scores say only how many weights each loses.
        """
        solver = self.reconstruction
        if solver is None or solver.whole or self.score.solver != solver.name:
            return False
        if request.start and not (solver.projects and (request.pattern or self.scope == "layer")):
            return False  # rows and blocks may have lost more than their share
        even = request.pattern is not None or (self.allocation.even and self.scope in solver.scopes)
        return solver.projects or (even and self.steps == 1)

    def check(self, request: Request, view: PrunableView | None = None) -> None:
        """Raise UserError for a request that cannot be, before anything is loaded, or with this model."""
        if view is not None and self.block_steps and not view.blocks:
            raise UserError("--block_steps: the blocks of this model are not known: leave it out")
        if request.pattern and request.sparsities:
            raise UserError(f"pattern {request.pattern} says how many weights are pruned and where: give no sparsity")
        if request.pattern and request.groups:
            raise UserError(f"--group_sparsity: pattern {request.pattern} decides what each group loses: leave it out")
        for option in self.bounds if request.pattern else ():
            raise UserError(f"--{option}: the pattern {request.pattern} decides what each layer loses: leave it out")
        if not request.pattern and not request.sparsities:
            raise UserError("give at least one sparsity, or a pattern")
        if request.pattern and self.steps > 1:
            raise UserError(f"{self.name} prunes in steps to a sparsity: a pattern needs epochs = 1, not {self.steps}")
        for sparsity in (*request.sparsities, *request.groups.values()):
            fraction(sparsity)
        check_blocks(self, request)
        if self.whole and request.start and request.pattern:
            raise UserError(f"--from_mask: {self.name} makes {request.pattern} of a dense model: leave it out")
        if self.whole and request.groups:
            raise UserError(f"--group_sparsity: {self.name} decides by itself what each block keeps: leave it out")
        if self.sequential and not self.refines and not self.by_blocks(request):
            raise UserError(
                f"allocation {self.allocation.name!r} compares layers with each other, which sequential calibration"
                " prunes one after the other: take allocation layer, or calibration_mode dense"
            )

    def facts(self, request: Request) -> dict[str, Any]:
        """Return all that decides the masks but for model, data and sparsity, for their provenance."""
        found: dict[str, Any] = {"pruner": self.name, "seed": request.seed}
        if self.preset is not None:
            found["preset"] = self.preset
        if request.pattern:
            found["pattern"] = str(request.pattern)
        else:
            pool = next((pool for pool, both in POOLS.items() if both == (self.allocation.name, self.scope)), None)
            found |= {**self.allocation.facts(), "scope": self.scope} | ({"pool": pool} if pool else {})
            found |= {option: str(value) for option, value in self.bounds.items()}
        found |= {"pattern": str(request.block)} if request.block else {}
        if request.groups:
            found["group_sparsity"] = {group: str(sparsity) for group, sparsity in request.groups.items()}
        if request.start:
            found["from_mask"] = request.start.digest()
        if self.of_inputs:
            found["calibration_mode"] = self.calibration
        if self.calibrate_within != "block":
            found["calibrate_within"] = self.calibrate_within
        found["reconstruction"] = self.reconstruction.name if self.reconstruction else NONE
        found |= options_of(self.score) | (self.reconstruction.options() if self.reconstruction else {})
        if self.dense_share:
            found["target"] = f"dense:{self.dense_share:g}"
        found |= {name: getattr(self, name) for name in ("correct_bias", "swaps") if getattr(self, name)}
        found |= {"block_steps": self.block_steps, "block_window": self.block_window} if self.block_steps else {}
        return found | {"epochs": self.steps, "schedule": self.schedule}


def make_plan(
    score: Score,
    *,
    pool: str | None = None,
    allocation: str | Mapping[str, Sparsity] | Allocation | None = None,
    scope: str | None = None,
    reconstruct: str | Reconstruction | None = None,
    calibration_mode: str | None = None,
    calibrate_within: str | None = None,
    offload: bool = False,
    epochs: int = 1,
    schedule: str | None = None,
    allocation_within: str = "model",
    min_keep: Sparsity = 0,
    max_keep: Sparsity = 1,
    target: str | None = None,
    correct_bias: bool = False,
    swaps: int = 0,
    layer_errors: bool = False,
    block_steps: int = 0,
    block_window: str | None = None,
    **own: Any,
) -> Plan:
    """Return the plan of a score: the preset of its pruner, but for the axes that are given.

    pool: one word for allocation and scope, see `POOLS`. allocation: a name, "error:output", or rules, glob or group ->
    sparsity (see `Given`). target: "same", or "dense:a", see `dense_share`. calibrate_within, correct_bias, swaps,
    layer_errors, block_steps, block_window: of `Plan`. own: options of the reconstruction. UserError, in one line, for
    a value that does not exist, an option that the plan does not read, and what cannot be combined.
    """
    name = score.name
    if pool is not None:
        if allocation is not None or scope is not None:
            raise UserError(f"--pool {pool} says allocation and scope: leave --allocation and --scope out")
        if pool not in POOLS:
            raise UserError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        allocation, scope = POOLS[pool]
    solver = _reconstruction(score, reconstruct, own)
    if solver and solver.whole and (allocation, scope) not in ((None, None), POOLS["global"]):
        what = f"pool {pool!r}" if pool else "--allocation and --scope"
        raise UserError(f"{name} decides by itself how many weights each block keeps: leave {what} out")
    shared = _allocation(score.allocation if allocation is None else allocation)
    scope = score.scope if scope is None else scope
    _among("scope", scope, SCOPES)
    check_schedule(epochs, schedule or "exp")
    if schedule is not None and epochs == 1:
        raise UserError("--schedule is how --epochs above 1 reach the sparsity: leave it out, or give --epochs")
    plan = Plan(score, shared, scope, solver, steps=epochs, schedule=schedule or "exp", offload=offload)
    plan = replace(plan, within=allocation_within, min_keep=min_keep, max_keep=max_keep)
    plan = replace(plan, dense_share=0.0 if target is None else dense_share(target), correct_bias=correct_bias)
    plan = replace(plan, swaps=check_swaps(swaps), layer_errors=layer_errors)
    _among("allocation_within", plan.within, WITHIN)
    check_allocation(plan)
    for option, given in (("target", target), ("correct_bias", correct_bias), ("layer_errors", layer_errors)):
        if given and (solver is None or solver.whole):
            raise UserError(f"--{option} is for what updates each layer's weights: leave it out, or give --reconstruct")
    if swaps and plan.whole:
        raise UserError(f"--swaps: {name} decides by itself which weights are pruned: leave it out")
    for option, given in (("calibration_mode", calibration_mode is not None), ("offload", offload)):
        if given and not plan.of_inputs:
            raise UserError(f"--{option}: {name} reads no inputs of layers: leave it out")
    if calibration_mode is None:
        calibration_mode = score.calibration if solver is None or solver.whole else solver.calibration
    _among("calibration_mode", calibration_mode, CALIBRATIONS)
    plan = replace(plan, calibration=calibration_mode, calibrate_within=calibrate_within or "block")
    _among("calibrate_within", plan.calibrate_within, CALIBRATED_WITHIN)
    if calibrate_within is not None and (plan.whole or not plan.sequential):
        raise UserError("--calibrate_within divides the blocks of --calibration_mode sequential: leave it out")
    check_target(plan)
    if block_window is not None and not block_steps:
        raise UserError("--block_window says which layers --block_steps trains: leave it out, or give --block_steps")
    window = block_window or plan.block_window
    plan = replace(plan, block_steps=check_steps(block_steps, window, WINDOWS), block_window=window)
    check_block_steps(plan)
    return plan


def _allocation(given: str | Mapping[str, Sparsity] | Allocation) -> Allocation:
    """Return what decides how much each layer loses. UserError for a name that does not exist."""
    if isinstance(given, Allocation):
        return given
    if isinstance(given, Mapping):
        return Given(given)
    name, colon, of = given.partition(":")
    kind = ALLOCATIONS.find(name)
    if colon and not inspect.signature(kind).parameters:
        raise UserError(f"--allocation {given}: {name} takes nothing after it")
    return kind(of) if colon else kind()


def _reconstruction(score: Score, given: str | Reconstruction | None, own: Mapping[str, Any]) -> Reconstruction | None:
    """Return what updates the kept weights, with its options."""
    given = score.reconstruction if given is None else given
    if given == NONE and score.reconstruction != NONE:
        raise UserError(f"{score.name} updates the weights that it keeps: leave --reconstruct none out")
    if given == NONE:
        if own:
            raise unread(score, next(iter(own)), None)
        return None
    if score.reconstruction not in (NONE, given):
        raise UserError(f"{score.name} is its own reconstruction: leave --reconstruct {given} out")
    if isinstance(given, Reconstruction):
        return given
    _among("reconstruct", given, (NONE, *RECONSTRUCTIONS.names()))
    kind = RECONSTRUCTIONS.find(given)
    known = inspect.signature(kind).parameters
    for option in own:
        if option not in known:
            raise unread(score, option, kind)
    made = kind(**own)
    if made.whole and score.solver != made.name:
        raise UserError(f"--reconstruct {given} chooses by itself which weights are pruned: -p {given}")
    return made


def _among(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UserError(f"{option} must be one of {', '.join(values)}, got {value!r}")
