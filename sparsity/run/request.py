"""A request to a plan: which masks are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparsity.allocation.budget import Sparsity
from sparsity.pattern import NM

if TYPE_CHECKING:  # importing it loads torch
    from sparsity.masks import Masks


@dataclass(frozen=True)
class Request:
    """Which masks are wanted.

    sparsities: fractions, one set of masks for each; or else a pattern, which takes their place. groups: the sparsity
    of each of these modalities, whatever the others lose. seed: of what is drawn. start: masks that are there, see
    `sparsity.resume.start.begun`: their zeros stay and count towards what is asked for, their updated weights take the
    place of the model's.
    """

    sparsities: Sequence[Sparsity] = ()
    pattern: NM | None = None
    seed: int = 42
    groups: Mapping[str, Sparsity] = field(default_factory=dict)
    start: "Masks | None" = None

    def each(self) -> "list[Request]":
        """Return a request for each set of masks."""
        return [self] if self.pattern else [replace(self, sparsities=(sparsity,)) for sparsity in self.sparsities]

    @property
    def target(self) -> Sparsity:
        """Return the sparsity of a request for one set of masks."""
        if self.pattern:
            return self.pattern.sparsity
        (sparsity,) = self.sparsities
        return sparsity
