"""When a model in training is pruned, and how far (arXiv 1710.01878). Needs no torch."""

from dataclasses import dataclass
from fractions import Fraction

from sparsity.errors import UserError

MASKS = 20  # at most, where nobody says how many steps are between two


@dataclass(frozen=True)
class Schedule:
    """Steps `first` to `last`, and a new mask after each `every` steps between them.

    A mask of step t is chosen before that step, so that the steps from `last` on train under the last one.
    """

    first: int
    last: int
    every: int

    @classmethod
    def of(cls, steps: int, start: float, until: float, every: int | None = None) -> "Schedule":
        """Return the schedule of a run of so many steps, of which `start` and `until` are fractions. At least one step
        is done under the last mask. UserError for a run without steps.
        """
        if steps < 1:
            raise UserError("--gradual prunes while the model trains, and this run has no steps: give it epochs")
        last = min(round(until * steps), steps - 1)
        first = min(round(start * steps), last)
        return cls(first, last, every or max(1, -(-(last - first) // MASKS)))

    def due(self, step: int) -> bool:
        """Return whether a mask is chosen before this step. There is none at `first`, where nothing has changed yet."""
        within = self.first < step < self.last and (step - self.first) % self.every == 0
        return within or step == self.last

    def sparsity(self, step: int, before: Fraction, target: Fraction) -> Fraction:
        """Return s + (s0 - s) (1 - (t - t0) / (t1 - t0))^3, exactly: s0 = `before` at t0 = `first`, s = `target` at
        t1 = `last`.
        """
        left = Fraction(self.last - step, self.last - self.first) if step < self.last else Fraction(0)
        return target + (before - target) * left**3
