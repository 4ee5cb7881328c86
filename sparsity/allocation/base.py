"""How much each layer loses: one file per allocation, whose name is its name on the command line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

from torch import Tensor

from sparsity.allocation.budget import Sparsity, as_written
from sparsity.view import PrunableView, members

# Statistics that take forward passes for each layer, of `sparsity.run.probing`: the importance of `ecoflap`, the errors
# of a part, and its sensitivity.
ZEROTH_ORDER, LAYER_ERRORS, OUTPUT_SENSITIVITY = PROBES = ("zeroth_order", "layer_errors", "output_sensitivity")


@dataclass(frozen=True)
class Part:
    """The weights among which a budget is shared out: all of a model, or those of one group.

    names: in prunable order. scores(names) -> (name, score (out, in)) of those weights, in that order; it may be called
    several times, and raises UserError where the plan has no scores of single weights. statistics: name of a statistic
    -> name of a weight -> tensor, of those that the allocation declares. errors(name, sparsities) -> for each of those
    sparsities of that layer, ascending and within (0, 1), the relative error of its output; None where the plan has
    none. sensitivity(name, sparsity) -> how far the model's output moves (relative squared change) for each unit of
    that error, when the layer alone is pruned to that sparsity; None where it is not measured. pruned: name -> how many
    of its weights are pruned already, by an earlier step or a mask that is there; 0 for names that are left out.
    min_keep, max_keep: fractions of each layer that must, and that may, be kept.
    """

    view: PrunableView
    names: Sequence[str]
    scores: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    errors: Callable[[str, Sequence[Fraction]], Sequence[float]] | None = None
    sensitivity: Callable[[str, Sparsity], float] | None = None
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

    @property
    def bounded(self) -> bool:
        """Return whether a layer may not lose any share of its weights."""
        return bool(as_written(self.min_keep)) or as_written(self.max_keep) != 1


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
    statistics: Sequence[str] = ()  # that it reads besides the score's: of passes.PASSES, or of `PROBES`
    local: ClassVar[bool] = False  # a layer's share depends on no score and no other layer's pruning
    by_scores: ClassVar[bool] = False  # where layers have bounds, the scores decide what each loses
    even: ClassVar[bool] = False  # its contests are: every layer, or row or block of it, loses the same share

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def contests(self, part: Part, sparsities: Sequence[Sparsity]) -> list[Contest]:
        """Return who competes with whom: every weight of the part in one contest, in prunable order."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what the provenance of masks says of it."""
        return {"allocation": self.name}


def by_groups(part: Part) -> list[Part]:
    """Return a part for each modality, in prunable order."""
    return [replace(part, names=names) for names in members(part.groups).values()]
