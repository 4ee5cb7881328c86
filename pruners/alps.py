from pruners.wanda import Wanda


class ALPS(Wanda):
    """ALPS, arXiv 2406.07831: the reconstruction `alps` finds mask and weights of each layer together, by alternating
    directions on H = X^T X (see sparsity.reconstruction.alps).

    The score is what it starts from, abs(w_ij) * ||X_j||_2: where layers compete, it says how many weights each loses.
    """

    scope = "layer"
    reconstruction = solver = "alps"
