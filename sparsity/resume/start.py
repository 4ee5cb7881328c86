"""A mask that is there before a run: what it prunes stays pruned, and counts towards what is asked for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsity.allocation.base import Part
from sparsity.allocation.budget import Sparsity, budget, fraction
from sparsity.bits import shape_in
from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.view import PrunableView, members


def begun(
    view: PrunableView,
    masks: Masks,
    weights: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Return masks under the names of a view, with their updated weights and biases, or these in their place.

    UserError for masks or weights that do not fit the view.
    """
    resolved = masks.resolve(view)
    own = masks.weights if weights is None else weights
    for name in own:
        if name in view.weights and shape_in(own, name) != tuple(view.weights[name].parameter.shape):
            raise UserError(f"the updated weights of {name!r} have the shape {shape_in(own, name)}")
    return Masks(resolved, masks.provenance, view.aliases, own, masks.biases if biases is None else biases)


def check_start(start: Masks, parts: Sequence[tuple[Part, Sequence[Sparsity]]]) -> None:
    """Raise UserError where less is asked for than is pruned already. parts: with the sparsities that are wanted."""
    for part, shares in parts:
        pruned = sum(lost(start[name]) for name in part.names)
        for share in shares:
            if budget(share, part.numel) < pruned:
                groups = members(part.groups) if len(part.names) < len(part.view.weights) else {}
                where = f" of {', '.join(groups)}" if groups else ""
                raise UserError(
                    f"--from_mask: {pruned} of {part.numel} weights{where} are pruned already"
                    f" ({100 * pruned / part.numel:.4g} %), more than {100 * float(fraction(share)):.4g} %: ask for a"
                    " higher sparsity"
                )


def lost(mask: Tensor) -> int:
    """Return how many weights a mask prunes."""
    return mask.numel() - int(mask.count_nonzero())


def check_pattern(view: PrunableView, start: Masks, pattern: NM) -> None:
    """Raise UserError, with the number of groups that have fewer weights left than the pattern keeps."""
    short, total, first = 0, 0, ""
    for name, weight in view.weights.items():
        if not pattern.fits(weight.shape[1]):
            continue
        left = weight.as_matrix(start[name]).unflatten(1, (-1, pattern.m)).sum(-1)
        short, total = short + int((left < pattern.n).sum()), total + left.numel()
        first = first or (name if bool((left < pattern.n).any()) else "")
    if short:
        raise UserError(
            f"--from_mask: {short} of {total} groups of {pattern.m} have fewer than {pattern.n} weights left, so that"
            f" {pattern} cannot be completed (first in {first}): take another pattern"
        )


def nested(masks: Masks, start: Masks, view: PrunableView) -> Masks:
    """Return masks without what was pruned before them. Weights and biases that were updated before, and that they do
    not update again, stay as they were, but for what is pruned.
    """
    kept = Masks(((name, mask & start[name]) for name, mask in masks.items()), masks.provenance, view.aliases)
    before = start.weights
    kept.weights = masks.weights or {n: torch.where(kept[n], before[n], 0) for n in view.weights if n in before}
    kept.biases, kept.errors = {**start.biases, **masks.biases}, masks.errors
    return kept
