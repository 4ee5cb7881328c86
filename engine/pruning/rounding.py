"""Weights rounded to 8 bits, to compare pruning with: simulated, in the arithmetic of the model."""

import torch
from torch import Tensor

from sparsity.masks import Masks
from sparsity.run.outcome import as_masks, packed
from sparsity.view import PrunableView

LARGEST = 127  # of int8, the same on both sides of 0


def int8_weights(view: PrunableView) -> Masks:
    """Return masks that prune nothing and round each prunable weight to 8 bits, by output channel: w becomes
    s round(w / s) with s = max |w| of the channel / 127. Activations, biases and what is never pruned stay as they are.
    """
    kept = {
        name: packed(view, name, torch.ones(weight.shape, dtype=torch.bool)) for name, weight in view.weights.items()
    }
    rounded = {name: weight.as_stored(_rounded(weight.matrix())) for name, weight in view.weights.items()}
    return as_masks(view, kept, {"rounding": "int8, weights alone, by output channel"}, rounded)


def _rounded(weight: Tensor) -> Tensor:
    """Weights (out, in) on the grid of their row."""
    step = weight.float().abs().amax(dim=1, keepdim=True) / LARGEST  # (out, 1)
    step = torch.where(step > 0, step, 1)
    return ((weight.float() / step).round() * step).to(weight.dtype)
