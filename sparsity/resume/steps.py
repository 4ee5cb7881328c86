"""Results of the steps of an iterative method so far, for a run that was killed."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from sparsity.masks import Masks
from sparsity.resume.kept import load_kept, save_kept
from sparsity.statistics.gradient_rows import Scratch
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

_SMALL = ("bias ", "errors ")  # what keys of other tensors begin with


class Trail:
    """Masks and updated weights after the last step, in a file.

    origin: identity of what the first step reads, and a path beside which the file lies; None: nothing is kept.
    provenance: of the masks, with all that decides the steps; its "sparsity" names the file.
    """

    def __init__(self, origin: Scratch | None, provenance: Mapping[str, Any]):
        self._provenance, self._path = provenance, None
        if origin:
            self._identity = json.dumps([origin.identity, provenance], sort_keys=True)
            self._path = origin.path.with_name(f"{origin.path.name}_{provenance['sparsity']}.step")

    def load(self, view: PrunableView) -> tuple[int, Masks | None]:
        """The number of the last step and what it has left; 0 and None where there is none of this identity."""
        kept = load_kept(self._path, self._identity) if self._path else None
        if kept is None:
            return 0, None
        (tensors, facts), names = kept, list(view.weights)
        logger.info("%s: going on after step %s", self._path, facts["step"])
        masks = {name: tensors[f"mask {name}"] for name in names}
        weights = {name: tensors[f"weight {name}"] for name in names if f"weight {name}" in tensors}
        biases, errors = ({k.removeprefix(p): t for k, t in tensors.items() if k.startswith(p)} for p in _SMALL)
        aliases = {name: weight.aliases for name, weight in view.weights.items()}
        return int(facts["step"]), Masks(masks, self._provenance, aliases, weights, biases, errors)

    def save(self, step: int, masks: Masks) -> None:
        """Takes the place of the step before."""
        if self._path:
            tensors = {f"mask {name}": mask for name, mask in masks.items()}
            tensors |= {f"weight {name}": weight for name, weight in masks.weights.items()}
            for prefix, small in zip(_SMALL, (masks.biases, masks.errors), strict=True):
                tensors |= {f"{prefix}{key}": value for key, value in small.items()}
            save_kept(self._path, tensors, {"identity": self._identity, "step": str(step)})

    def forget(self) -> None:
        """Removes the file."""
        if self._path:
            self._path.unlink(missing_ok=True)
