from collections.abc import Sized

from pruners.base import Pruner
from sparsity.errors import UserError
from sparsity.learned.scores import choice, learn, start_from_magnitude
from sparsity.statistics.gradients import batch_generator


class TAMT(Pruner):
    """Task-agnostic mask training, arXiv 2204.11218: a score of each weight is trained on the pretraining loss of the
    model under the mask of the highest abs(score), straight-through; the weights are frozen. Each sparsity is trained
    for, from the dense model; a step is a round of batches, and `num_batches` the number of steps.

    mask_lr: AdamW's rate at the first step, from which it goes linearly to 0. mask_decay: its weight decay.
    """

    statistic = "learned_scores"
    scored, trains = False, True

    def __init__(self, mask_lr: float = 5e-5, mask_decay: float = 0.01):
        self.mask_lr, self.mask_decay = mask_lr, mask_decay

    def measure(
        self,
        view,
        batches,
        *,
        rounds=None,
        scratch=None,
        progress=None,
        reduce=None,
        generators=None,
        sparsity=None,
        pattern=None,
        pool=None,
    ):
        """The scores learned for a sparsity in a pool, or for a pattern; nothing is read where neither is given, since
        sparsities share nothing.
        """
        if sparsity is None and pattern is None:
            return {}
        if batches is None:
            raise UserError("pruner 'tamt' needs calibration data")
        target = pattern.sparsity if pattern else sparsity
        return learn(
            view,
            start_from_magnitude(view, target, pattern),
            choice(view, target, pattern=pattern, pool=pool or self.pool),
            progress(batches) if progress else batches,
            rounds=[1] * len(batches) if rounds is None else rounds,
            lr=self.mask_lr,
            weight_decay=self.mask_decay,
            generators=generators,
            reduce=reduce,
        )

    def score(self, weight, statistic, generator):
        if statistic is None:
            raise UserError("tamt learns other scores for each sparsity: there are none that serve all")
        return statistic.abs()

    def masks(self, view, statistics, sparsities, *, pattern=None, pool=None, seed=42, again=None):
        self._check(sparsities, pattern, pool)
        if again is None:
            raise UserError("tamt reads the batches anew for each sparsity")
        for sparsity in [None] if pattern else sparsities:
            learned = again(0, sparsity=sparsity, pattern=pattern, pool=pool)
            given = None if pattern else [sparsity]
            ((reached, kept),) = super().masks(view, learned, given, pattern=pattern, pool=pool, seed=seed)
            kept.provenance |= {"mask_lr": self.mask_lr, "mask_decay": self.mask_decay}
            yield reached, kept

    def prune(self, view, batches, sparsities, *, pattern=None, pool=None, seed=42, progress=None, reduce=None):
        """As any pruner's, but the batches are read for each sparsity, and each is a step: a list, or a loader that
        knows its length.
        """
        if batches is not None and not isinstance(batches, Sized):
            raise UserError("tamt reads the batches anew for each sparsity: give a list, or a loader with a length")

        def again(_, **target):
            return self.measure(view, batches, progress=progress, reduce=reduce, generators=generators, **target)

        def generators(number):
            return batch_generator(seed, number)

        yield from self.masks(view, {}, sparsities, pattern=pattern, pool=pool, seed=seed, again=again)
