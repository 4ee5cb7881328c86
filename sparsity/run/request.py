"""A request to a plan: which masks are wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparsity.allocation.budget import Sparsity
from sparsity.pattern import NM, Block

if TYPE_CHECKING:  # importing it loads torch
    from sparsity.masks import Masks


@dataclass(frozen=True)
class Request:
    """Which masks are wanted.

    sparsities: fractions, one set of masks for each; or else a pattern, which takes their place. groups: the sparsity
    of each of these modalities, whatever the others lose. seed: of what is drawn. start: masks that are there, see
    `sparsity.resume.start.begun`: their zeros stay and count towards what is asked for, their updated weights take the
    place of the model's. block: weights are pruned in blocks; sparsities are then those of the layers that divide into
    them.
    """

    sparsities: Sequence[Sparsity] = ()
    pattern: NM | None = None
    seed: int = 42
    groups: Mapping[str, Sparsity] = field(default_factory=dict)
    start: "Masks | None" = None
    block: Block | None = None

    @classmethod
    def of(
        cls,
        sparsities: Sequence[Sparsity],
        pattern: NM | Block | None,
        seed: int = 42,
        groups: Mapping[str, Sparsity] | None = None,
        start: "Masks | None" = None,
    ) -> "Request":
        """Return a request for a pattern of either kind, or for sparsities without one."""
        if isinstance(pattern, Block):
            return cls(sparsities, None, seed, groups or {}, start, pattern)
        return cls(sparsities, pattern, seed, groups or {}, start)

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
