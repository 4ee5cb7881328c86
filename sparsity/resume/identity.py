"""What a model is, for provenance and for files that are read again only where they belong to it."""

from functools import cached_property

from sparsity.masks import model_digest, state_digest
from sparsity.view import PrunableView


class ModelIdentity:
    """The digests of a model as it is when each is first asked for; for a run, which makes one and hands it on.

    Nothing can tell that a model has changed since (`parameter.data` is written to without a new version): after a step
    that changes it, make another.
    """

    def __init__(self, view: PrunableView):
        self._view = view

    @cached_property
    def weights(self) -> str:
        """`model_digest`: of the prunable weights."""
        return model_digest(self._view)

    @cached_property
    def state(self) -> str:
        """`state_digest`: of all that the model holds."""
        return state_digest(self._view.model)
