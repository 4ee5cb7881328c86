"""Which layers read the same tensor, as one forward pass shows: query, key and value of an attention, say."""

from collections.abc import Sequence
from typing import Any
from weakref import ref

from torch import Tensor

from sparsity.statistics.inputs import Statistics
from sparsity.view import PrunableView


class _Readers(Statistics):
    """Notes the tensors that each layer reads, and measures nothing.

    read: name of a weight -> numbers of the tensors, in the order in which layers are run.
    """

    def __init__(self, view: PrunableView):
        super().__init__(view, "input_norms")
        self.read: dict[str, list[int]] = {}
        self._tensors: list[tuple[Any, int]] = []  # weak reference to a tensor, its version

    def _observe(self, name: str, key: str, source: Tensor) -> None:
        alike = (
            i for i, (seen, version) in enumerate(self._tensors) if seen() is source and version == source._version
        )
        number = next(alike, len(self._tensors))
        if number == len(self._tensors):
            self._tensors.append((ref(source), source._version))
        self.read.setdefault(name, []).append(number)


def by_inputs(view: PrunableView, order: Sequence[Sequence[str]], batch: Any) -> list[list[str]]:
    """Return the stages divided into those layers that read the same tensors, in the order in which these are run.

    The layers of a stage that a batch does not reach come last, as one.
    """
    readers = _Readers(view)
    with readers:
        readers.add(batch)
    place = {name: number for number, name in enumerate(readers.read)}
    found: list[list[str]] = []
    for names in order:
        parts: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(names, key=lambda name: place.get(name, len(place))):
            parts.setdefault(tuple(readers.read.get(name, ())), []).append(name)
        found += parts.values()
    return found
