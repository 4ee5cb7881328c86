"""Weights that load without this project."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from engine.files import replacing


def save_weights(model: nn.Module, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the state dict as safetensors, floating-point tensors as `dtype`; tied tensors stand under each name."""
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    return Path(path)
