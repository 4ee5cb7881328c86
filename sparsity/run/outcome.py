"""The outcome of a plan: from (out, in) tensors to masks with their provenance."""

import logging
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsity.bits import Bits
from sparsity.errors import UserError, listed
from sparsity.masks import Masks
from sparsity.pattern import NM, Block
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


def packed(view: PrunableView, name: str, kept: Tensor) -> Bits:
    """Return what is kept of a layer, bool (out, in), as masks hold it: a bit each, in the parameter's own layout."""
    return Bits.of(view.weights[name].as_stored(kept))


def as_masks(
    view: PrunableView,
    kept: Mapping[str, Bits],
    provenance: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    **more: Mapping[str, Tensor],
) -> Masks:
    """Return the masks of all layers, of `packed`, in prunable order. weights: in the parameters' own layout, what the
    kept ones become where they were updated. more: biases and errors of `Masks`.
    """
    return Masks({name: kept[name] for name in view.weights}, provenance, view.aliases, weights, **more)


def versions() -> dict[str, str]:
    """Return the versions of what has computed masks."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def alive_of(view: PrunableView, masks: Masks, name: str) -> Tensor:
    """Return what masks keep of a layer, (out, in), on its device."""
    weight = view.weights[name]
    return weight.as_matrix(masks[name].to(weight.parameter.device))


def fits(pattern: NM | Block | None, shape: Sequence[int]) -> bool:
    """Return whether a weight (out, in) divides into what a pattern prunes; one that does not stays dense."""
    if isinstance(pattern, NM):
        return pattern.fits(shape[1])
    return pattern is None or pattern.fits(shape)


def dense_layers(view: PrunableView, pattern: NM | Block) -> list[str]:
    """Return the names of the layers that stay dense because the pattern does not divide them."""
    return [name for name, weight in view.weights.items() if not fits(pattern, weight.shape)]


def check_fits(view: PrunableView, pattern: NM | Block) -> None:
    """Raise UserError where a pattern divides no layer, so that nothing would be pruned; warn of layers that stay
    dense.
    """
    dense = dense_layers(view, pattern)
    if isinstance(pattern, Block):
        if len(dense) == len(view.weights):
            raise UserError(f"{pattern} divides no layer of the model: choose smaller blocks")
        if dense:
            logger.warning("%d layers stay dense, as %s does not divide them: %s", len(dense), pattern, listed(dense))
        return
    if len(dense) == len(view.weights):
        widths = ", ".join(map(str, sorted({weight.shape[1] for weight in view.weights.values()})))
        raise UserError(f"{pattern}: {pattern.m} divides the inputs of no layer, which are {widths}: choose another M")
    if dense:
        logger.warning(
            "%d layers stay dense, as %d does not divide their inputs: %s", len(dense), pattern.m, listed(dense)
        )
