from pruners.wanda import Wanda


class ADMM(Wanda):
    """ADMM with gradual pruning, arXiv 2401.02938: the reconstruction `admm` finds mask and weights of each layer
    together (see sparsity.reconstruction.admm).

    The score is what it starts from, abs(w_ij) * ||X_j||_2: where layers compete, it says how many weights each loses.
    """

    scope = "layer"
    reconstruction = solver = "admm"
