"""Casts of weights to another floating-point type, and the account of what they lose."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsity.bits import MadeTensors, Recipe, recipes_of
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
    return dict(casting(state, dtype, allowed=allowed, way_out=way_out))


def casting(
    state: Mapping[str, Tensor],
    dtype: torch.dtype | Mapping[str, torch.dtype],
    *,
    allowed: Collection[str] = (),
    way_out: str = "",
) -> MadeTensors:
    """Return what `cast` does, each tensor made when it is asked for; what they lose is found here."""
    recipes = recipes_of(state)
    targets = dtype if isinstance(dtype, Mapping) else dict.fromkeys(recipes, dtype)
    kinds = {n: targets.get(n, r.dtype) if r.dtype in FLOATS else r.dtype for n, r in recipes.items()}
    lost = [loss for name, recipe in recipes.items() for loss in _losses_of(name, recipe, kinds[name])]
    for kind, fate in LOSSES.items():
        found = [loss for loss in lost if loss.kind == kind]
        if not found:
            continue
        names = ", ".join(loss.name for loss in found[:_SHOWN]) + " ..." * (len(found) > _SHOWN)
        types = ", ".join(sorted({_named(kinds[loss.name]) for loss in found}))
        told = f"{sum(loss.values for loss in found)} values {fate} as {types}, in {names}"
        if kind not in allowed:
            raise UserError(f"{told}: take a type that holds them{way_out and '; ' + way_out}")
        log.warning("%s", told)
    asked = {name: recipe.dtype for name, recipe in recipes.items() if recipe.dtype != targets.get(name, recipe.dtype)}
    carried = {name: kind for name, kind in asked.items() if kind.is_floating_point and kind not in FLOATS}
    if carried:
        told = ", ".join(sorted({_named(kind) for kind in carried.values()}))
        log.warning("%d tensors of %s stay as they are, for example %s", len(carried), told, next(iter(carried)))
    return MadeTensors({n: Recipe(kinds[n], r.shape, partial(_made, r, kinds[n])) for n, r in recipes.items()})


def _made(recipe: Recipe, dtype: torch.dtype) -> Tensor:
    return recipe.make().to(dtype)


def _losses_of(name: str, recipe: Recipe, dtype: torch.dtype) -> list[Loss]:
    if dtype == recipe.dtype or recipe.dtype not in FLOATS or _holds(dtype, recipe.dtype):
        return []
    before = recipe.make()
    return losses(name, before, before.to(dtype))


def losses(name: str, before: Tensor, after: Tensor) -> list[Loss]:
    """Return what a cast of a tensor has lost; NaN and infinity that were there before are none."""
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
