from pruners.base import Pruner


class OMP(Pruner):
    """One-shot magnitude pruning: score = abs(W), compared over all weights (`--pool layer` or `group` on request)."""

    def score(self, weight, statistic, generator):
        return weight.abs()
