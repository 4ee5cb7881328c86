"""Masks that were found together with updated weights, in a model that has other ones."""

import logging
from pathlib import Path

from sparsity.masks import Masks
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


def warn_of_updates(masks: Masks, view: PrunableView, path: Path) -> None:
    """Warn where masks were found with updated weights, and the model has weights that they prune: those are the dense
    model's, for which the masks alone are worth far less. Call it before they are applied.

    path: of their file, which the warning names.
    """
    found = masks.provenance.get("reconstruction", "none") != "none" or masks.provenance.get("block_steps")
    own = {name: weight.parameter.detach() for name, weight in view.weights.items()}
    if found and any(bool((own[name].cpu()[~mask] != 0).any()) for name, mask in masks.resolve(view).items()):
        beside = path.with_name(path.name.replace("_pruning_masks", "_weights"))
        logger.warning(
            "--mask %s was found together with updated weights, and the model has the dense ones, which lose more:"
            " start from a model that was saved with them (prune.py --save_model, or export.py; see %s)",
            path,
            beside.name,
        )
