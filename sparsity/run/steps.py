"""What the steps of an iterative method have left so far, for a run that was killed."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from sparsity.files import write_atomic
from sparsity.masks import Masks
from sparsity.statistics.gradient_rows import Scratch
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


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
        if self._path is None:
            return 0, None
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata, names = file.metadata(), list(view.weights)
                if metadata["identity"] != self._identity:
                    return 0, None
                masks, weights = ({n: file.get_tensor(f"{kind} {n}") for n in names} for kind in ("mask", "weight"))
        except (OSError, SafetensorError):  # there is none, or a damaged one
            return 0, None
        logger.info("%s: going on after step %s", self._path, metadata["step"])
        aliases = {name: weight.aliases for name, weight in view.weights.items()}
        return int(metadata["step"]), Masks(masks, self._provenance, aliases, weights)

    def save(self, step: int, masks: Masks) -> None:
        """Takes the place of the step before."""
        if self._path:
            tensors = {f"mask {name}": mask for name, mask in masks.items()}
            tensors |= {f"weight {name}": weight.contiguous() for name, weight in masks.weights.items()}
            write_atomic(self._path, serialize(tensors, {"identity": self._identity, "step": str(step)}))

    def forget(self) -> None:
        """Removes the file."""
        if self._path:
            self._path.unlink(missing_ok=True)
