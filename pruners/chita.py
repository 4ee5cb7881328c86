from pruners.base import Pruner


class CHITA(Pruner):
    """CHITA, arXiv 2302.14623: the reconstruction `chita` chooses what is pruned together with what the other weights
    become, from the gradients of single mini-batches (see sparsity.reconstruction.chita). With `--epochs` above 1 it is
    CHITA++: each step starts from the pruned and updated weights of the step before, on fresh batches; what is pruned
    stays pruned.
    """

    reconstruction = solver = "chita"
    in_steps = True
