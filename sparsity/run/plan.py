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

from sparsity.allocation.base import Allocation
from sparsity.allocation.budget import check_schedule, fraction
from sparsity.errors import UserError
from sparsity.pattern import Block
from sparsity.reconstruction.base import Reconstruction
from sparsity.run.axes import ALLOCATIONS, CALIBRATIONS, POOLS, RECONSTRUCTIONS, SCOPES
from sparsity.run.memory import Demand
from sparsity.run.request import Request
from sparsity.selection import SELECTION
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
    that the already pruned blocks before them give. steps, schedule: the sparsity is reached in so many steps, each on
    fresh statistics of the model that the step before has left. offload: what is added up is kept on the host. preset:
    what the provenance of masks says of the preset that stood for this plan.
    """

    score: Score
    allocation: Allocation
    scope: str
    reconstruction: Reconstruction | None = None
    calibration: str = "dense"
    steps: int = 1
    schedule: str = "exp"
    offload: bool = False
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
        both = [*of_score, *self.allocation.statistics, *(solver.statistics if solver else ())]
        return list(dict.fromkeys(both))

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
        return self.scored and self.reconstruction is None

    @property
    def resumes(self) -> bool:
        """Whether steps or blocks that are done are kept for a run that is killed."""
        return self.steps > 1 or (not self.whole and (self.sequential or self.reconstruction is not None))

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
        even = request.pattern is not None or (self.allocation.even and self.scope in solver.scopes)
        return solver.projects or (even and self.steps == 1)

    def demand(self, request: Request, rows: int = 0) -> Demand:
        """Return what decides the memory of a request. rows: bytes of gradient rows that are held in memory."""
        # Gram matrices of all layers are there together only where scores made of them are compared between layers.
        together = self.statistic == "hessian" and not (self.by_blocks(request) or self.joint(request))
        return Demand(
            self.statistics,
            sparsities=max(1, len(request.sparsities)),
            solver=self.reconstruction is not None,
            sequential=not together and (self.sequential or self.reconstruction is not None),
            offload=self.offload,
            rows=rows,
        )

    def check(self, request: Request) -> None:
        """Raise UserError for a request that cannot be, before anything is loaded."""
        if request.pattern and request.sparsities:
            raise UserError(
                f"the pattern {request.pattern} decides how many weights are pruned and where: give no sparsity"
            )
        if request.pattern and request.groups:
            raise UserError(
                f"--group_sparsity: the pattern {request.pattern} decides what each group loses: leave it out"
            )
        if not request.pattern and not request.sparsities:
            raise UserError("give at least one sparsity, or a pattern")
        if request.pattern and self.steps > 1:
            raise UserError(
                f"{self.name} prunes step by step to a sparsity: a pattern needs epochs = 1, got {self.steps}"
            )
        for sparsity in (*request.sparsities, *request.groups.values()):
            fraction(sparsity)
        if request.block:
            self._check_blocks(request.block, request)
        if self.whole and request.groups:
            raise UserError(f"--group_sparsity: {self.name} decides by itself what each block keeps: leave it out")
        if self.sequential and self.reconstruction is None and not self.by_blocks(request):
            raise UserError(
                f"allocation {self.allocation.name!r} compares layers with each other, which sequential calibration"
                " prunes one after the other: take allocation layer, or calibration_mode dense"
            )

    def _check_blocks(self, block: Block, request: Request) -> None:
        """Raise UserError where this plan cannot prune blocks of weights."""
        if self.whole:
            raise UserError(f"--pattern {block}: {self.name} chooses single weights of the whole model: leave it out")
        if self.scope == "block" and not self.joint(request):
            raise UserError(f"--scope block compares single weights: with --pattern {block} take --scope layer or row")
        if self.scope == "block" and SELECTION % block.columns:
            raise UserError(f"--pattern {block}: its columns must divide the {SELECTION} of --scope block")

    def facts(self, request: Request) -> dict[str, Any]:
        """Return all that decides the masks but for model, data and sparsity, for their provenance."""
        found: dict[str, Any] = {"pruner": self.name, "seed": request.seed}
        if self.preset is not None:
            found["preset"] = self.preset
        if request.pattern:
            found["pattern"] = str(request.pattern)
        else:
            pool = next((pool for pool, both in POOLS.items() if both == (self.allocation.name, self.scope)), None)
            found |= {"allocation": self.allocation.name, "scope": self.scope} | ({"pool": pool} if pool else {})
        if request.block:
            found["pattern"] = str(request.block)
        if request.groups:
            found["group_sparsity"] = {group: str(sparsity) for group, sparsity in request.groups.items()}
        if self.of_inputs:
            found["calibration_mode"] = self.calibration
        found["reconstruction"] = self.reconstruction.name if self.reconstruction else NONE
        found |= options_of(self.score) | (self.reconstruction.options() if self.reconstruction else {})
        return found | {"epochs": self.steps, "schedule": self.schedule}


def options_of(made: Any) -> dict[str, Any]:
    """Return the options that a score or a reconstruction was made with: its constructor's parameters."""
    return {name: getattr(made, name) for name in inspect.signature(type(made)).parameters}


def make_plan(
    score: Score,
    *,
    pool: str | None = None,
    allocation: str | Allocation | None = None,
    scope: str | None = None,
    reconstruct: str | Reconstruction | None = None,
    calibration_mode: str | None = None,
    offload: bool = False,
    epochs: int = 1,
    schedule: str | None = None,
    **own: Any,
) -> Plan:
    """Return the plan of a score: the preset of its pruner, but for the axes that are given.

    pool: one word for allocation and scope, see `POOLS`. own: options of the reconstruction. UserError, in one line,
    for a value that does not exist, an option that the plan does not read, and what cannot be combined.
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
    chosen = score.allocation if allocation is None else allocation
    shared = ALLOCATIONS.find(chosen)() if isinstance(chosen, str) else chosen
    scope = score.scope if scope is None else scope
    _among("scope", scope, SCOPES)
    check_schedule(epochs, schedule or "exp")
    if schedule is not None and epochs == 1:
        raise UserError("--schedule is how --epochs above 1 reach the sparsity: leave it out, or give --epochs")
    plan = Plan(score, shared, scope, solver, "dense", epochs, schedule or "exp", offload)
    for option, given in (("calibration_mode", calibration_mode is not None), ("offload", offload)):
        if given and not plan.of_inputs:
            raise UserError(f"--{option}: {name} reads no inputs of layers: leave it out")
    if calibration_mode is None:
        calibration_mode = score.calibration if solver is None or solver.whole else solver.calibration
    _among("calibration_mode", calibration_mode, CALIBRATIONS)
    return replace(plan, calibration=calibration_mode)


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


def unread(score: Score, option: str, reconstruction: type[Reconstruction] | None) -> UserError:
    """Return the error for an option that a plan does not read."""
    known = [*inspect.signature(type(score)).parameters]
    known += [*inspect.signature(reconstruction).parameters] if reconstruction else []
    return UserError(f"pruner {score.name!r} has no option {option!r}; it has: {', '.join(known) or 'none of its own'}")


def _among(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UserError(f"{option} must be one of {', '.join(values)}, got {value!r}")
