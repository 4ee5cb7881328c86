from pruners.base import Pruner


class LocalMP(Pruner):
    """Layer-wise magnitude pruning: score = abs(W), compared within each layer."""

    pool = "layer"

    def score(self, weight, statistic, generator):
        return weight.abs()
