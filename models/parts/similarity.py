"""Similarities and scores that autocast leaves alone.

Under bfloat16 a similarity over a temperature of 0.01 is wrong by up to 0.5, and many candidates are equal.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside the block operations run in the dtype of their inputs."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def normalised(features: Tensor) -> Tensor:
    """l2-normalised rows (..., E), in float32 or, where the features have it, float64."""
    with without_autocast(features.device):
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def similarity(rows: Tensor, columns: Tensor, temp: Tensor) -> Tensor:
    """Similarities (A, B) over temperature of l2-normalised features (A, E) and (B, E), in float32.

    They are summed in float64: sums of float32 are off by 5e-5 at a temperature of 0.01, these by the 4e-6 to which
    float32 rounds numbers near 100. MPS has no float64 and sums in float32.
    """
    with without_autocast(rows.device):
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        logits = rows.to(wide) @ columns.to(wide).t() / temp.to(wide)
        return logits.to(torch.promote_types(rows.dtype, torch.float32))


def head(layer: nn.Module, states: Tensor) -> Tensor:
    """Scores by a last layer in the dtype of its weights, float32 under autocast."""
    with without_autocast(states.device):
        return layer(states.to(next(layer.parameters()).dtype))
