"""Models with their zeros, from what the scripts of this project write."""

import logging
from pathlib import Path

from engine.pruning.start import updated
from engine.updated_weights import found_with_updates, weights_beside
from sparsity.errors import MissingFileError, UserError
from sparsity.masks import Masks
from sparsity.resume.start import begun
from sparsity.view import PrunableView

log = logging.getLogger(__name__)


def masks_of(view: PrunableView, path: Path) -> Masks:
    """Return the masks of a file under the names of a view, with the updated weights and biases that prune.py wrote
    beside it, where there are some. Raises UserError where masks of a reconstruction have lost their weights, or where
    the file is for another model.
    """
    masks = Masks.load(path)
    beside = weights_beside(path)
    there = beside != path and beside.is_file()
    if there:
        log.info("%s: the updated weights that belong to the mask", beside)
    elif found_with_updates(masks):
        raise MissingFileError(f"{beside}: the mask was found with updated weights, and their file is not there")
    try:
        return begun(view, masks, *(updated(view, beside) if there else ()))
    except UserError as error:
        raise UserError(f"--mask {path}: {error}") from None


def zeros_of(view: PrunableView) -> Masks:
    """Return the masks that the zeros of a model's weights are; UserError where there are next to none."""
    masks = {name: weight.parameter.detach() != 0 for name, weight in view.weights.items()}
    gone = sum(int((~mask).sum()) for mask in masks.values())
    if 1000 * gone < view.numel:
        raise UserError("the weights have no zeros: give --mask FILE, or --weights FILE of a pruned model")
    return Masks({name: mask.cpu() for name, mask in masks.items()}, {}, view.aliases)
