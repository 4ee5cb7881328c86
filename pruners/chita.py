import logging
from collections.abc import Sized
from contextlib import nullcontext

from pruners.base import Pruner, as_masks
from sparsity.allocation.budget import budget, check_schedule, step_sparsity
from sparsity.errors import UserError
from sparsity.reconstruction.chita import solve
from sparsity.run.steps import Trail
from sparsity.statistics.gradient_rows import DTYPES, fit, gradient_rows, human

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

    def preflight(self, view, sparsities, *, pattern=None, pool=None, rounds=None, folder=None):
        self._check(sparsities, pattern, pool)
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

    def measure(self, view, batches, *, progress=None, reduce=None, generators=None, rounds=None, scratch=None):
        """The gradient rows, `sparsity.statistics.gradient_rows.Rows`: one for each round, or for each batch where no
        rounds are given.
        """
        if batches is None:
            raise UserError("pruner 'chita' needs calibration data")
        if rounds is None and not isinstance(batches, Sized):
            raise UserError("chita needs to know how many batches there are: give a list, or a loader with a length")
        return gradient_rows(
            view,
            progress(batches) if progress else batches,
            rounds=[1] * len(batches) if rounds is None else rounds,
            budget=self.memory_budget // self._held,
            dtype=self.row_dtype,
            scratch=scratch,
            generators=generators,
            reduce=reduce,
        )

    def masks(self, view, statistics, sparsities, *, pattern=None, pool=None, seed=42, again=None):
        self._check(sparsities, pattern, pool)
        if again is None and self.epochs > 1:
            raise UserError("chita needs fresh batches in each of its epochs")
        provenance = self._provenance(view, seed) | {"lambda_": self.lambda_, "epochs": self.epochs}
        provenance |= {"schedule": self.schedule, "row_dtype": self.row_dtype}
        provenance |= {"rows": statistics.n, "batch_size": statistics.batch_size}
        if pattern:
            dense = [name for name, weight in view.weights.items() if not pattern.fits(weight.shape[1])]
            facts = {"pattern": str(pattern), "sparsity": str(pattern.sparsity), "dense_layers": dense}
            yield pattern.sparsity, self._step(view, statistics, None, None, provenance | facts, pattern)
        trails = []
        for sparsity in sparsities or ():
            facts = provenance | {"pool": self.pool, "sparsity": str(sparsity)}
            trails.append(Trail(statistics.origin if self.epochs > 1 else None, facts))
            done, pruned = trails[-1].load(view)
            for step in range(done + 1, self.epochs + 1):
                count = view.numel - budget(step_sparsity(sparsity, step, self.epochs, self.schedule), view.numel)
                with pruned.applied(view) if pruned else nullcontext():
                    rows = again(step - 1) if step > 1 else statistics
                    pruned = self._step(view, rows, pruned, count, facts)
                trails[-1].save(step, pruned)
                if step > 1:
                    rows.forget()
            yield sparsity, pruned
        for done in (statistics, *trails):
            done.forget()

    def _step(self, view, rows, before, count, provenance, pattern=None):
        """The masks of one step, with the updated weights; the model is what the step before, if any, has left."""
        weights = {name: weight.matrix() for name, weight in view.weights.items()}
        alive = before and {
            name: weight.as_matrix(before[name].to(weight.parameter.device)) for name, weight in view.weights.items()
        }
        kept, updated = {}, {}
        for name, chosen, solved in solve(rows, weights, count, ridge=self.lambda_, pattern=pattern, alive=alive):
            kept[name], updated[name] = chosen, solved
        return as_masks(view, kept, provenance, updated)

    def _check(self, sparsities, pattern, pool):
        if pattern and self.epochs > 1:
            raise UserError("chita prunes step by step to a sparsity: a pattern needs epochs = 1")
        if pool not in (None, self.pool):
            raise UserError(f"chita decides by itself how many weights each block keeps: leave pool {pool!r} out")
        return super()._check(sparsities, pattern, pool)
