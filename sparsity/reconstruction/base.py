"""Reconstructions update the kept weights: one file per method, whose name is its name on the command line."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sparsity.allocation.budget import Sparsity
from sparsity.errors import UserError
from sparsity.pattern import NM, Block
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView


@dataclass(frozen=True)
class Problem:
    """A layer whose kept weights are to be updated.

    weight: (out, in), never written to. statistics: by name, those that the reconstruction declares, of this layer.
    kept: (out, in), bool, the mask; None where the reconstruction finds it: then sparsity (a fraction; None with a
    pattern), scope and pattern say what is legal. count: how many weights are pruned, in place of a sparsity that each
    unit of the scope loses. alive: (out, in), bool, the mask within which it has to find its own. dense_share: a of
    `--target dense:a`, the share of the wanted output that is the dense model's on the dense inputs; then `statistics`
    has "cross" too. 0: the output of W on the inputs that the layer gets. block: a mask that is found prunes whole
    blocks of weights; sparsity and count are then those of blocks.
    """

    name: str
    weight: Tensor
    statistics: dict[str, Tensor]
    kept: Tensor | None = None
    sparsity: Sparsity | None = None
    scope: str = "layer"
    pattern: NM | None = None
    dense_share: float = 0.0
    count: int | None = None
    alive: Tensor | None = None
    block: Block | None = None


class Reconstruction:
    """Base of the methods that update the kept weights of a layer from statistics of its inputs."""

    name: ClassVar[str]  # on the command line
    statistics: ClassVar[tuple[str, ...]] = ("hessian",)  # of sparsity.statistics.passes.PASSES
    scopes: ClassVar[tuple[str, ...]] = ()  # within which it finds a mask by itself; none: it needs one
    projects: ClassVar[bool] = False  # the mask that it finds can have any count, and lie within another one
    calibration: ClassVar[str] = "sequential"  # on which inputs, unless the plan says it
    whole: ClassVar[bool] = False  # it solves all layers together: see `WholeModel`
    targets: ClassVar[tuple[str, ...]] = ("same",)  # of "same" and "dense"

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def solve(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return what is kept, (out, in) bool, and the updated weights, (out, in) in the weight's dtype, exactly 0
        wherever a weight is pruned.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the options that it was made with, for the provenance of masks."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}


class WholeModel(Reconstruction):
    """Base of the methods that solve all layers together, from a statistic of their own, and choose what is pruned."""

    whole = True

    def preflight(self, view: PrunableView, rounds: Sequence[int], folder: Path | None, steps: int) -> int:
        """Return how many bytes of the statistic are held in memory. UserError where it fits nowhere.

        rounds, folder: of the calibration pass.
        """
        raise NotImplementedError

    def measure(self, view: PrunableView, reading: CalibrationPass, steps: int) -> Any:
        """Return the statistic. steps: of the plan, in each of which it is measured anew."""
        raise NotImplementedError

    def facts(self, measured: Any) -> dict[str, Any]:
        """Return what the provenance of masks says of the statistic."""
        return {}

    def solve_all(
        self, view: PrunableView, measured: Any, pruned: int, pattern: NM | None, alive: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Return (name, what is kept, updated weights), (out, in) both, of every layer.

        pruned: how many weights of all; with a pattern, that says it. alive: name -> bool (out, in), False where a
        weight was pruned before and stays so.
        """
        raise NotImplementedError

    def forget(self, measured: Any) -> None:
        """Remove what was kept of the statistic for a run that is killed."""


def check_problem(reconstruction: Reconstruction, problem: Problem) -> None:
    """Raise UserError, which names the layer, where a reconstruction does not take this problem."""
    here = f"layer {problem.name!r}: reconstruction {reconstruction.name!r}"
    if problem.dense_share and "dense" not in reconstruction.targets:
        raise UserError(f"{here} knows no target but the layer's own output: leave --target dense out")
    if problem.kept is not None:
        if problem.kept.shape != problem.weight.shape:
            wanted, found = tuple(problem.weight.shape), tuple(problem.kept.shape)
            raise UserError(f"{here}: the mask has the shape {found}, the weight {wanted}")
        return
    if not reconstruction.scopes:
        raise UserError(f"{here} needs a mask: choose a score, whose mask it gets")
    if not reconstruction.projects and (problem.count is not None or problem.alive is not None):
        raise UserError(f"{here} finds no mask of a given count, and none within another: choose a score for it")
    much = problem.sparsity is not None or problem.count is not None
    if problem.pattern is None and (not much or problem.scope not in reconstruction.scopes):
        scopes = ", ".join(reconstruction.scopes)
        raise UserError(f"{here} finds a mask of an N:M pattern, or of a sparsity within a scope: {scopes}")


def check_rounds(rounds: int) -> int:
    """Return the number of rounds. UserError unless it is a whole number from 1."""
    if not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds must be a whole number from 1, got {rounds!r:.60}")
    return rounds


def check_mask(problem: Problem) -> Tensor:
    """Return the mask of a problem that must have one. UserError where it has none."""
    if problem.kept is None:
        raise UserError(f"layer {problem.name!r}: this reconstruction needs a mask")
    return problem.kept
