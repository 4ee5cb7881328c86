"""How much each layer loses: one file per allocation, whose name is its name on the command line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor

from sparsity.allocation.budget import Sparsity
from sparsity.view import PrunableView, members


@dataclass(frozen=True)
class Part:
    """The weights among which a budget is shared out: all of a model, or those of one group.

    names: in prunable order. scores(names) -> (name, score (out, in)) of those weights, in that order; it may be called
    several times, and raises UserError where the plan has no scores of single weights. statistics: name of a statistic
    -> name of a weight -> tensor, of those that the allocation declares. errors(name, sparsities) -> for each of those
    sparsities of that layer, ascending and within (0, 1), the relative error of its output; None where the plan has
    none. pruned: name -> how many of its weights are pruned already, by an earlier step or a mask that is there; 0 for
    names that are left out. min_keep, max_keep: fractions of each layer that must, and that may, be kept.
    """

    view: PrunableView
    names: Sequence[str]
    scores: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    errors: Callable[[str, Sequence[Fraction]], Sequence[float]] | None = None
    pruned: Mapping[str, int] = field(default_factory=dict)
    min_keep: Sparsity = 0
    max_keep: Sparsity = 1

    @property
    def groups(self) -> dict[str, str]:
        """Return name -> group."""
        return {name: self.view.weights[name].group for name in self.names}

    @property
    def sizes(self) -> list[int]:
        """Return how many weights each layer has."""
        return [self.view.weights[name].numel for name in self.names]

    @property
    def numel(self) -> int:
        """Return how many weights there are."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Contest:
    """Weights that compete with each other.

    counts: for each sparsity, how many of them are pruned. even: each layer, or row, or block, loses the same share,
    rounded down where that is decided (in the scope), so that `counts` is not spread.
    """

    names: Sequence[str]
    counts: Sequence[int]
    even: bool = False


class Allocation:
    """Base of the allocations."""

    name: ClassVar[str]  # on the command line
    statistics: Sequence[str] = ()  # that it reads besides the score's
    local: ClassVar[bool] = False  # a layer's share depends on no score and no other layer's pruning
    even: ClassVar[bool] = False  # all of its contests are even

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return who competes with whom: every weight of the part in one contest, in prunable order."""
        raise NotImplementedError


def within_groups(
    allocation: Allocation,
    part: Part,
    sparsities: Sequence[Sparsity],
    of_groups: Mapping[str, Sequence[Sparsity]] | None = None,
) -> list[Contest]:
    """Return the contests of an allocation that is applied to each modality by itself, so that each keeps its share.

    Args:
        of_groups: group -> its own sparsities, as many as there are; the others have those of the part.
    """
    contests = []
    for group, names in members(part.groups).items():
        own = (of_groups or {}).get(group, sparsities)
        contests += allocation.contests(replace(part, names=names), own)
    return contests
