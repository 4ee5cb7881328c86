import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pruners.base import Again, Measured, Pruner, as_masks, dense_layers
from sparsity.allocation.budget import Sparsity, budget, check_schedule, step_sparsity
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.reconstruction.chita import solve
from sparsity.run.request import PLAIN_PASS, CalibrationPass, Request
from sparsity.run.steps import Trail
from sparsity.statistics.gradient_rows import DTYPES, Rows, fit, gradient_rows, human
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


class CHITA(Pruner):
    """CHITA, arXiv 2302.14623, block-wise (Q of sparsity.reconstruction.chita): which weights go is chosen together
    with what the others become, from the gradients of single mini-batches. With `epochs` above 1 it is CHITA++: the
    schedule's steps, each on fresh batches and from the pruned and updated weights of the step before; what is pruned
    stays pruned.

    lambda_: ridge penalty. memory_budget: bytes of gradient rows that are held in memory; more go to a file. row_dtype:
    float32, or bfloat16 for half the room. The masks carry the updated weights (`Masks.weights`).
    """

    statistic = "gradient_rows"
    scored = False

    def __init__(
        self,
        lambda_: float = 1e-5,
        epochs: int = 1,
        schedule: str = "exp",
        memory_budget: int = 4 * 10**9,
        row_dtype: str = "float32",
    ):
        check_schedule(epochs, schedule)
        if not lambda_ > 0:
            raise UserError(f"lambda_ must be above 0, got {lambda_!r}")
        if row_dtype not in DTYPES:
            raise UserError(f"row_dtype must be one of {', '.join(DTYPES)}, got {row_dtype!r}")
        self.lambda_, self.epochs, self.schedule = lambda_, epochs, schedule
        self.memory_budget, self.row_dtype = memory_budget, row_dtype
        self._held = 1 if epochs == 1 else 2  # the first step's rows serve every sparsity

    def preflight(
        self,
        view: PrunableView,
        request: Request,
        *,
        rounds: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._check(request)
        if rounds is None:
            return
        inside = fit(view.numel, rounds, self.row_dtype, self.memory_budget, folder, self._held)
        size = self._held * len(rounds) * view.numel * DTYPES[self.row_dtype].itemsize
        working = view.numel * (10 if self.epochs == 1 else 18)  # sum of the rows, updated weights, masks, copies
        logger.info(
            "chita: %d gradient rows of %s weights; needs %s in memory besides model and gradients, %s on disk",
            len(rounds),
            f"{view.numel:,}",
            human(working + inside * size),
            human((not inside) * size),
        )

    def measure(self, view: PrunableView, batches: Iterable[Any] | None, reading: CalibrationPass = PLAIN_PASS) -> Rows:
        """The gradient rows: one for each round, or for each batch where no rounds are given."""
        if batches is None:
            raise UserError("pruner 'chita' needs calibration data")
        return gradient_rows(
            view,
            reading.over(batches),
            rounds=reading.rounds_of(batches),
            budget=self.memory_budget // self._held,
            dtype=self.row_dtype,
            scratch=reading.scratch,
            generators=reading.generators,
            reduce=reading.reduce,
        )

    def masks(
        self, view: PrunableView, statistics: Measured, request: Request, again: Again | None = None
    ) -> Iterator[tuple[Sparsity, Masks]]:
        self._check(request)
        if again is None and self.epochs > 1:
            raise UserError("chita needs fresh batches in each of its epochs")
        first, pattern = _rows(statistics), request.pattern
        provenance = self._provenance(view, request.seed) | {"lambda_": self.lambda_, "epochs": self.epochs}
        provenance |= {"schedule": self.schedule, "row_dtype": self.row_dtype}
        provenance |= {"rows": first.n, "batch_size": first.batch_size}
        if pattern:
            facts = {"pattern": str(pattern), "sparsity": str(pattern.sparsity)}
            facts |= {"dense_layers": dense_layers(view, pattern)}
            pruned = self._step(view, first, provenance | facts, pattern=pattern)
            yield pattern.sparsity, pruned
        trails = []
        for sparsity in request.sparsities:
            facts = provenance | {"pool": self.pool, "sparsity": str(sparsity)}
            trails.append(Trail(first.origin if self.epochs > 1 else None, facts))
            done, pruned = trails[-1].load(view)
            for step in range(done + 1, self.epochs + 1):
                count = view.numel - budget(step_sparsity(sparsity, step, self.epochs, self.schedule), view.numel)
                with pruned.applied(view) if pruned else nullcontext():
                    rows = _rows(again(step - 1)) if again and step > 1 else first
                    pruned = self._step(view, rows, facts, count=count, before=pruned)
                trails[-1].save(step, pruned)
                if step > 1:
                    rows.forget()
            assert pruned is not None, "there is at least one step"
            yield sparsity, pruned
        for done in (first, *trails):
            done.forget()

    def _step(
        self,
        view: PrunableView,
        rows: Rows,
        provenance: Mapping[str, Any],
        *,
        count: int | None = None,
        pattern: NM | None = None,
        before: Masks | None = None,
    ) -> Masks:
        """The masks of one step, with the updated weights: `count` weights are kept, or what the pattern says. before:
        the masks of the step before, if any; the model is what it has left.
        """
        weights = {name: weight.matrix() for name, weight in view.weights.items()}
        alive = before and {
            name: weight.as_matrix(before[name].to(weight.parameter.device)) for name, weight in view.weights.items()
        }
        kept, updated = {}, {}
        for name, chosen, solved in solve(rows, weights, count, ridge=self.lambda_, pattern=pattern, alive=alive):
            kept[name], updated[name] = chosen, solved
        return as_masks(view, kept, provenance, updated)

    def _check(self, request: Request) -> str:
        if request.pattern and self.epochs > 1:
            raise UserError("chita prunes step by step to a sparsity: a pattern needs epochs = 1")
        if request.pool not in (None, self.pool):
            raise UserError(
                f"chita decides by itself how many weights each block keeps: leave pool {request.pool!r} out"
            )
        return super()._check(request)


def _rows(measured: Measured) -> Rows:
    assert isinstance(measured, Rows), "CHITA measures gradient rows"
    return measured
