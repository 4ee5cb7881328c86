"""Masks that were found together with updated weights, in a model that has other ones."""

import logging
from pathlib import Path

from sparsity.masks import Masks
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)
_MASKS, _WEIGHTS = "_pruning_masks", "_weights"  # how prune.py names a mask file, and updated weights beside it


def weights_beside(path: Path) -> Path:
    """Return where prune.py writes the updated weights of a mask file; the file itself where it has another name."""
    return path.with_name(path.name.replace(_MASKS, _WEIGHTS))


def found_with_updates(masks: Masks) -> bool:
    """Return whether masks were found together with updated weights."""
    return masks.provenance.get("reconstruction", "none") != "none" or bool(masks.provenance.get("block_steps"))


def warn_of_updates(masks: Masks, view: PrunableView, path: Path) -> None:
    """Warn where masks were found with updated weights, and the model has weights that they prune: those are the dense
    model's, for which the masks alone are worth far less. Call it before they are applied.

    path: of their file, which the warning names.
    """
    if not found_with_updates(masks):
        return
    own = {name: weight.parameter.detach() for name, weight in view.weights.items()}
    if any(bool((own[name].cpu()[~mask] != 0).any()) for name, mask in masks.resolve(view).items()):
        logger.warning(
            "--mask %s was found together with updated weights, and the model has the dense ones, which lose more:"
            " start from a model that was saved with them (prune.py --save_model, or export.py; see %s)",
            path,
            weights_beside(path).name,
        )
