"""Learnable N:M masks: MaskLLM (arXiv 2409.17481).

    masks = LearnableMasks(view, NM(2, 4), seed=0)           # the model's layers have gates now
    masks.start_from(Masks.load("prior.safetensors"), 3.0)
    masks.anneal(scaling=10.0, tau=4.0)
    masks.draw(step)                                         # the noise of a step
    loss = view.loss(batch) - 1e-5 * masks.squared_weight()
    masks.masks()                                            # what has been learned

A layer stays what it is, with its weight under its name; it gets a parameter `gate` beside it, and computes with the
weight times its mask: while it trains with one that is sampled, else with the candidates that the gate prefers now. So
does what reads `layer.weight` itself; the parameter is `layer.parameter`. Weights that are tied share one gate and one
sample.
"""

from sparsity.learned.checkpoint import fold
from sparsity.learned.layer import MaskedLinear, MaskedLinearFrozen, folded
from sparsity.learned.learnable_masks import LearnableMasks

__all__ = ["LearnableMasks", "MaskedLinear", "MaskedLinearFrozen", "fold", "folded"]
