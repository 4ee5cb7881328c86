import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsity.errors import UserError
from sparsity.pattern import NM
from sparsity.reconstruction.base import WholeModel
from sparsity.solvers.blockwise import solve
from sparsity.statistics.gradient_rows import DTYPES, Rows, fit, gradient_rows, human
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


class Chita(WholeModel):
    """CHITA, arXiv 2302.14623, block-wise (Q of sparsity.solvers.blockwise): what is pruned is chosen together
    with what the other weights become, from the gradients of single mini-batches.

    lambda_: ridge penalty. memory_budget: bytes of gradient rows that are held in memory; more go to a file. row_dtype:
    float32, or bfloat16 for half the room.
    """

    statistics = ("gradient_rows",)

    def __init__(self, lambda_: float = 1e-5, memory_budget: int = 4 * 10**9, row_dtype: str = "float32"):
        if not lambda_ > 0:
            raise UserError(f"lambda_ must be above 0, got {lambda_!r}")
        if row_dtype not in DTYPES:
            raise UserError(f"row_dtype must be one of {', '.join(DTYPES)}, got {row_dtype!r}")
        self.lambda_, self.memory_budget, self.row_dtype = lambda_, memory_budget, row_dtype

    def options(self) -> dict[str, Any]:
        """Return the options that decide the masks; how much memory may be used is none."""
        return {"lambda_": self.lambda_, "row_dtype": self.row_dtype}

    def preflight(self, view: PrunableView, rounds: Sequence[int], folder: Path | None, steps: int) -> int:
        inside = fit(view.numel, rounds, self.row_dtype, self.memory_budget, folder, _held(steps))
        size = _held(steps) * len(rounds) * view.numel * DTYPES[self.row_dtype].itemsize
        told = "chita: %d gradient rows of %s weights are %s %s"
        logger.info(told, len(rounds), f"{view.numel:,}", human(size), "in memory" if inside else "in a file")
        return size if inside else 0

    def measure(self, view: PrunableView, reading: CalibrationPass, steps: int) -> Rows:
        """Return the gradient rows: one for each round, or for each batch where no rounds are given."""
        return gradient_rows(
            view,
            reading.over(),
            rounds=reading.rounds_of(),
            budget=self.memory_budget // _held(steps),
            dtype=self.row_dtype,
            scratch=reading.scratch,
            generators=reading.generators,
            reduce=reading.reduce,
        )

    def facts(self, measured: Rows) -> dict[str, Any]:
        return {"rows": measured.n, "batch_size": measured.batch_size}

    def solve_all(
        self, view: PrunableView, measured: Rows, pruned: int, pattern: NM | None, alive: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        weights = {name: weight.matrix() for name, weight in view.weights.items()}
        count = None if pattern else view.numel - pruned
        yield from solve(measured, weights, count, ridge=self.lambda_, pattern=pattern, alive=alive)

    def forget(self, measured: Rows) -> None:
        measured.forget()


def _held(steps: int) -> int:
    """Sets of rows at a time: the first step's serve every sparsity."""
    return 1 if steps == 1 else 2
