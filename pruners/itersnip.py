from pruners.snip import SNIP


class IterSNIP(SNIP):
    """Iterative SNIP, arXiv 2006.09081: SNIP in the `--epochs` steps of a `--schedule`, each of which scores the model
    as pruned so far on fresh batches. What is pruned stays pruned.
    """

    in_steps = True
