"""Casts of weights to another floating-point type, and the account of what they lose."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import UserError

log = logging.getLogger(__name__)

# Whose values stand for themselves. Those of float8 and float4 mean something with their scales only.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOSSES = {"vanished": "vanish (become 0)", "overflowed": "overflow (become infinite)"}
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Loss:
    """values: how many of the tensor `name` the cast changes so."""

    kind: str
    name: str
    values: int


def cast(
    state: Mapping[str, Tensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    *,
    allowed: Collection[str] = (),
    way_out: str = "",
) -> dict[str, Tensor]:
    """Cast the tensors of `FLOATS` to `dtype`, or each to its own, one of them; all others are as they were.

    A number that `dtype` makes infinite has overflowed, one that is not 0 and becomes 0 has vanished: of a pruned
    weight that is kept, that is another mask. Rounding is no loss.

    Args:
        allowed: of `LOSSES`, those that are only logged.
        way_out: ends the message of the error.

    Raises:
        UserError: a loss that is not allowed.
    """
    targets = dtype if isinstance(dtype, Mapping) else dict.fromkeys(state, dtype)
    result = {n: t.to(targets.get(n, t.dtype)) if t.dtype in FLOATS else t for n, t in state.items()}
    lost = [loss for name, tensor in state.items() for loss in losses(name, tensor, result[name])]
    for kind, fate in LOSSES.items():
        found = [loss for loss in lost if loss.kind == kind]
        if not found:
            continue
        names = ", ".join(loss.name for loss in found[:_SHOWN]) + " ..." * (len(found) > _SHOWN)
        types = ", ".join(sorted({_named(result[loss.name].dtype) for loss in found}))
        told = f"{sum(loss.values for loss in found)} values {fate} as {types}, in {names}"
        if kind not in allowed:
            raise UserError(f"{told}: take a type that holds them{way_out and '; ' + way_out}")
        log.warning("%s", told)
    asked = {name for name, tensor in state.items() if tensor.dtype != targets.get(name, tensor.dtype)}
    carried = [n for n, t in state.items() if n in asked and t.is_floating_point() and t.dtype not in FLOATS]
    if carried:
        kinds = ", ".join(sorted({_named(state[name].dtype) for name in carried}))
        log.warning("%d tensors of %s stay as they are, for example %s", len(carried), kinds, carried[0])
    return result


def losses(name: str, before: Tensor, after: Tensor) -> list[Loss]:
    """What a cast of a tensor has lost; NaN and infinity that were there before are none."""
    if before.dtype not in FLOATS or _holds(after.dtype, before.dtype):
        return []
    counts = {
        "vanished": int(((before != 0) & (after == 0)).sum()),
        "overflowed": int((before.isfinite() & after.isinf()).sum()),
    }
    return [Loss(kind, name, values) for kind, values in counts.items() if values]


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether each number of `other` is one of `dtype`."""
    wide, narrow = torch.finfo(dtype), torch.finfo(other)
    smallest = [kind.tiny * kind.eps for kind in (wide, narrow)]  # subnormal
    return wide.max >= narrow.max and smallest[0] <= smallest[1]


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
