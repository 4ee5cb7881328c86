"""Models with their zeros, from what the scripts of this project write."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sparsity.errors import MissingFileError, UserError
from sparsity.masks import Masks
from sparsity.view import PrunableView

log = logging.getLogger(__name__)
_MASKS, _WEIGHTS = "_pruning_masks", "_weights"  # how prune.py names a mask file, and updated weights beside it


def masks_of(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> Masks:
    """Return the masks of a file, with the updated weights that prune.py wrote beside it, where there are some.

    read: what reads a weights file. Raises UserError where masks of a reconstruction have lost their weights.
    """
    masks = Masks.load(path)
    beside = path.with_name(path.name.replace(_MASKS, _WEIGHTS))
    if beside != path and beside.is_file():
        log.info("%s: the updated weights that belong to the mask", beside)
        return Masks(dict(masks), masks.provenance, masks.aliases, read(beside))
    if masks.provenance.get("reconstruction", "none") != "none":
        raise MissingFileError(f"{beside}: the mask was found with updated weights, and their file is not there")
    return masks


def zeros_of(view: PrunableView) -> Masks:
    """Return the masks that the zeros of a model's weights are; UserError where there are next to none."""
    masks = {name: weight.parameter.detach() != 0 for name, weight in view.weights.items()}
    gone = sum(int((~mask).sum()) for mask in masks.values())
    if 1000 * gone < view.numel:
        raise UserError("the weights have no zeros: give --mask FILE, or --weights FILE of a pruned model")
    return Masks({name: mask.cpu() for name, mask in masks.items()}, {}, view.aliases)
