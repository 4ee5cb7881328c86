import torch

from pruners.snip import SNIP
from sparsity.allocation.budget import check_schedule, step_sparsity
from sparsity.errors import UserError


class IterSNIP(SNIP):
    """Iterative SNIP, arXiv 2006.09081: at each of `epochs` steps the model as pruned so far is scored on fresh
    batches, and pruned further, to the sparsity that the schedule gives. What is pruned stays pruned."""

    def __init__(self, epochs: int = 1, schedule: str = "exp"):
        check_schedule(epochs, schedule)
        self.epochs, self.schedule = epochs, schedule
        self._kept = None  # the masks of the step before

    def scores(self, view, statistics, *, seed=42, names=None):
        for name, score in super().scores(view, statistics, seed=seed, names=names):
            # Below every survivor, also where survivors score 0.
            yield name, score if self._kept is None else torch.where(self._mask(view, name), score, -1.0)

    def masks(self, view, statistics, sparsities, *, pattern=None, pool=None, seed=42, again=None):
        if pattern and self.epochs > 1:
            raise UserError("itersnip prunes step by step to a sparsity: a pattern needs epochs = 1")
        if pattern:
            yield from super().masks(view, statistics, sparsities, pattern=pattern, pool=pool, seed=seed)
            return
        if again is None and self.epochs > 1:
            raise UserError("itersnip needs fresh batches in each of its epochs")
        for sparsity in sparsities:
            self._kept = None
            for step in range(1, self.epochs + 1):
                if step > 1:
                    with self._kept.applied(view):
                        statistics_now = again(step - 1)
                else:
                    statistics_now = statistics
                target = step_sparsity(sparsity, step, self.epochs, self.schedule)
                ((_, kept),) = super().masks(view, statistics_now, [target], pool=pool, seed=seed)
                self._kept = kept
            kept.provenance |= {"sparsity": str(sparsity), "epochs": self.epochs, "schedule": self.schedule}
            self._kept = None
            yield sparsity, kept

    def _mask(self, view, name):
        weight = view.weights[name]
        return weight.as_matrix(self._kept[name].to(weight.parameter.device))
