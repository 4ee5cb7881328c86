"""Presets: names that stand for a pruner with options, looked up before anything is loaded.

What a preset stands for depends on the pattern, or on the sparsity, alone. An option that is given beats the preset's.
A preset whose table changes gets the next version, which masks and reports record with what it stood for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsity.allocation.budget import Sparsity, fraction
from sparsity.errors import UserError
from sparsity.pattern import NM


@dataclass(frozen=True)
class Choice:
    """A pruner, with options of `pruners.build`."""

    pruner: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([f"-p {self.pruner}", *(_option(*item) for item in self.options.items())])

    def given(self, options: Mapping[str, Any]) -> "Choice":
        """Return this choice with those of its own options that are given."""
        return Choice(self.pruner, {name: options.get(name, value) for name, value in self.options.items()})


@dataclass(frozen=True)
class Preset:
    """Hold what a preset stands for. means: in one line. pattern: with N:M. sparsities: from which sparsity on ->
    choice, ascending, the first from 0.
    """

    means: str
    version: int
    pattern: Choice
    sparsities: Mapping[str, Choice]

    def choices(self, pattern: Any, sparsities: Sequence[Sparsity]) -> dict[str, Choice]:
        """Return target -> choice: of the pattern or the sparsities; of all that there are, where neither is given."""
        if isinstance(pattern, NM):
            return {str(pattern): self.pattern}
        if not sparsities:
            return {"N:M": self.pattern, **{f"from {least}": found for least, found in self.sparsities.items()}}
        return {str(sparsity): self._at(sparsity) for sparsity in sparsities}

    def _at(self, sparsity: Sparsity) -> Choice:
        (*_, found) = (found for least, found in self.sparsities.items() if fraction(least) <= fraction(sparsity))
        return found


# Half the dense model's output as target, with biases that keep the mean output, leads at 75 and 90 % on vit-mini and
# xvlm-mini. Layers whose error moves the output of the model more lose less, which is far ahead at 90 %. At 2:4 nothing
# is ahead of plain ALPS, which is cheaper.
_SOLVED: dict[str, Any] = {"target": "dense:0.5", "damp": "auto", "correct_bias": True}
_SHARED_OUT = Choice("alps", {**_SOLVED, "allocation": "error:output"})
_PLAIN, _FAST = Choice("alps"), Choice("wanda")

PRESETS = {
    "best": Preset("the best known quality without training; solves each layer", 4, _PLAIN, {"0": _SHARED_OUT}),
    "fast": Preset("good masks from one pass over the data; the kept weights stay as they are", 1, _FAST, {"0": _FAST}),
}


def resolve(name: str, pattern: Any, sparsities: Sequence[Sparsity]) -> Choice:
    """Return what a preset stands for with this pattern, or at all of these sparsities.

    UserError where it stands for several: those are runs of their own.
    """
    found = PRESETS[name].choices(pattern, sparsities)
    first, *_ = found.values()
    if any(choice != first for choice in found.values()):
        told = "; ".join(f"{target}: {choice}" for target, choice in found.items())
        raise UserError(f"preset {name!r} stands for several pruners here ({told}): give one target at a time")
    return first


def record(name: str, choice: Choice, options: Mapping[str, Any]) -> str:
    """Return what masks and reports say of a preset: its version, and what it stands for with these options."""
    return f"{name}, version {PRESETS[name].version}: {choice.given(options)}"


def _option(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"
