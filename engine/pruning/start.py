"""A run that begins with a mask that is there, and with the weights that its run has updated."""

import logging
from pathlib import Path

from safetensors import safe_open

from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.resume.kept import StoredTensors
from sparsity.resume.start import begun
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

_MASKS, _WEIGHTS = "_pruning_masks.safetensors", "_weights.safetensors"  # how the files of a run end


def load_start(view: PrunableView, mask: Path | None, weights: Path | None = None) -> Masks | None:
    """Return the masks of a file, with the updated weights of another, under the names of the view; None for no file.

    UserError, naming the file, for masks or weights of another model. Warns of updated weights that lie beside the mask
    file and are not asked for.
    """
    if mask is None:
        return None
    masks = Masks.load(mask)
    beside = mask.with_name(mask.name.replace(_MASKS, _WEIGHTS))
    if weights is None and beside != mask and beside.is_file():
        logger.warning(
            "--from_mask %s: the model's own weights are taken; --from_weights %s has updated ones", mask, beside
        )
    try:
        return begun(view, masks, *(updated(view, weights) if weights else ()))
    except UserError as error:
        raise UserError(f"--from_mask {mask}: {error}") from None


def updated(view: PrunableView, path: Path) -> tuple[StoredTensors, StoredTensors]:
    """Return name of each prunable weight -> what it was updated to, and the same of other parameters that were."""
    weights, biases = StoredTensors(), StoredTensors()
    weights.add(path, {name: name for name in view.weights})
    keys = view.parameters.keys() - {key for keys in view.aliases.values() for key in keys}
    with safe_open(path, framework="pt") as file:  # after it was found to be whole
        there = set(file.keys())
    biases.add(path, {key: key for key in keys if key in there})
    return weights, biases
