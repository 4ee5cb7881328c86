from pruners.base import LayerWise


class Wanda(LayerWise):
    """Wanda, arXiv 2306.11695, eq. 1: score_ij = abs(w_ij) * ||X_j||_2, compared within each output row, or each group
    of M.

    calibration_mode: "dense" (default) or "sequential", and offload: see `LayerWise`.
    """

    statistic = "input_norms"
    pool = "row"
    mode = "dense"

    def score(self, weight, statistic, generator):
        return weight.abs().double() * statistic.sqrt()
