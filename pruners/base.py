"""A pruner is an equation: it turns a weight, and its calibration statistics, into a score.

How many weights are pruned, where, on which inputs, in how many steps, and what becomes of the others are other axes of
a plan (sparsity.run.plan); a pruner says which values of them it is published with. A new method is a file with a class
of about ten lines: a docstring with paper and equation, `statistic` and `score`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.run.plan import NONE
from sparsity.statistics.reading import Statistic
from sparsity.view import PrunableView


class Pruner:
    """Base of all pruners: a score, and the values of the other axes that it is published with."""

    name: ClassVar[str]  # on the command line
    statistic: str | Statistic | None = None  # of sparsity.statistics.passes.PASSES, or its own; None: no data
    allocation: ClassVar[str] = "global"  # a file of sparsity.allocation
    scope: ClassVar[str] = "layer"  # of sparsity.run.axes.SCOPES
    reconstruction: ClassVar[str] = NONE  # a file of sparsity.reconstruction
    solver: ClassVar[str | None] = None  # the reconstruction that chooses the mask itself, in place of this score
    calibration: ClassVar[str] = "dense"  # of sparsity.run.axes.CALIBRATIONS
    in_steps: ClassVar[bool] = False  # published with several steps, whose number `--epochs` says
    draws: ClassVar[bool] = False  # scores depend on the seed where no data is read, too

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2] if cls.__module__.startswith("pruners.") else cls.__name__.lower()

    def score(self, weight: Tensor, statistic: Any, generator: torch.Generator) -> Tensor:
        """Return scores (out, in), floating point, of which the lowest are pruned first.

        weight: (out, in). statistic: of this layer (None where none is declared). generator: the layer's own.
        """
        raise UserError(f"pruner {self.name!r} does not score single weights")

    def prepare(self, view: PrunableView, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what `score` needs of the statistics, name -> tensor; they may be taken apart."""
        return statistics
