"""Numbers that have become NaN or infinite are found before they are saved."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError

TRY = "try a lower lr, or --precision 32-true"
SHOWN = 3  # names in a message


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer, when: str) -> None:
    """UserError, naming the first tensors, where a weight or a moment of the optimizer is not finite."""
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    tensors = [*named, *_tensors(optimizer.state_dict(), "optimizer")]
    flags = [torch.isfinite(tensor).all() for _, tensor in tensors]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):  # one transfer for all
        return
    names = [_bare(name) for (name, _), finite in zip(tensors, flags, strict=True) if not finite]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise UserError(f"NaN or infinite {when}: {', '.join(names[:SHOWN])}{more}; it is not saved: {TRY}")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested dicts and lists, each with the keys that lead to it."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{name}.{key}")


def _bare(name: str) -> str:
    """Without what Fabric and DDP put around a model."""
    return name.replace("_forward_module.", "").removeprefix("module.")
