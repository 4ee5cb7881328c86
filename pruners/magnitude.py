from pruners.base import Pruner


class Magnitude(Pruner):
    """Magnitude pruning as one-shot N:M methods are compared with it: score = abs(W), within each group of M, or within
    each layer."""

    pool = "layer"

    def score(self, weight, statistic, generator):
        return weight.abs()
