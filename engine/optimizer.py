"""Optimizers as the public recipes set them up."""

from collections.abc import Sequence

import torch
from torch import nn


def adamw(model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float]) -> torch.optim.AdamW:
    """AdamW without decay on norms, biases and scalars (every parameter of fewer than two dimensions)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), fused=True)
