"""Layer-wise methods block by block: each block is calibrated on what the already pruned blocks before it put out.

Memory holds the statistics of one block. They come from `sparsity.replay`, or from a pass through the whole model for
each block. What is done with a block is written beside the results, so that a run that was killed goes on after it.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.masks import state_digest
from sparsity.resume.kept import load_kept, save_kept
from sparsity.statistics.gradient_rows import Scratch
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)


def stages(view: PrunableView) -> list[list[str]]:
    """The names of the weights that are pruned together, in execution order.

    They are the view's blocks; a weight that several blocks use (tied) belongs to the first of them, and where blocks
    lie in each other, to the inner one. Layers outside every block come where they stand in the model: before all
    blocks, or after the block of the weight before them. Without blocks, all weights are one.
    """
    home = {id(module): i for i, block in enumerate(view.blocks or ()) for module in block.modules()}
    found: dict[tuple[int, int], list[str]] = {}
    last = -1
    for name, weight in view.weights.items():
        inside = [home[id(module)] for module in weight.modules if id(module) in home]
        last = min(inside, default=last)
        found.setdefault((last, 0 if inside else 1), []).append(name)
    return [names for _, names in sorted(found.items())]


@dataclass
class Done:
    """A pruned weight, (out, in): which of it is kept, and what it has become where the method updates."""

    kept: Tensor
    updated: Tensor | None


def origin_of(view: PrunableView, reading: CalibrationPass) -> Scratch | None:
    """Return what decides all that is computed: data, model, and the arithmetic of a pass; and a path beside which it
    is kept. None where the pass keeps nothing.
    """
    if reading.scratch is None:
        return None
    device = view.device.type
    with reading.arithmetic():
        arithmetic = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "plain"
    facts = json.dumps([reading.scratch.identity, state_digest(view.model), stages(view), arithmetic])
    return Scratch(reading.scratch.path, facts)


def by_blocks(
    view: PrunableView,
    measure: Callable[[list[str]], dict[str, dict[str, Tensor]]],
    prune: Callable[[str, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor | None]],
    progress: "Progress",
    *,
    sequential: bool = True,
    order: Sequence[list[str]] | None = None,
) -> dict[str, Done]:
    """Return name -> what has become of the weight.

    measure: names -> name of a statistic -> name -> tensor, in the model as it is then. prune: (name, weight (out, in),
    its statistics by name) -> kept, and updated weight or None. sequential: whether pruned blocks take the place of the
    dense ones for those that come after them. order: the stages, as `Replayed.order` has them (default: as registered).
    """
    order = stages(view) if order is None else order
    finished = progress.load(order)
    with replaced(view, finished if sequential else {}) as put:
        for number, names in enumerate(order):
            if names[0] in finished:
                continue
            logger.info("block %d of %d: %d layers, from %s", number + 1, len(order), len(names), names[0])
            statistics = measure(names)
            block = {}
            for name in names:
                own = {statistic: found.pop(name) for statistic, found in statistics.items() if name in found}
                block[name] = Done(*prune(name, view.weights[name].matrix(), own))
            progress.save(number, block)
            if sequential:
                put(block)
            finished |= block
    return finished


@contextmanager
def replaced(view: PrunableView, finished: Mapping[str, Done]) -> Iterator[Callable[[Mapping[str, Done]], None]]:
    """The model with pruned weights inside the block, where more can be put in; afterwards each parameter has its own
    storage back, which was never written to.
    """
    before: list[tuple[torch.nn.Parameter, Tensor]] = []

    def put(done: Mapping[str, Done]) -> None:
        for name, what in done.items():
            weight = view.weights[name]
            matrix = weight.matrix() * what.kept if what.updated is None else what.updated
            before.append((weight.parameter, weight.parameter.data))
            weight.parameter.data = weight.as_stored(matrix).to(weight.parameter).contiguous()
        torch.clear_autocast_cache()  # it holds what weights were, also under an autocast of the caller's

    try:
        put(finished)
        yield put
    finally:
        for parameter, data in before:
            parameter.data = data
        torch.clear_autocast_cache()


class Progress:
    """Files with the blocks that are done, one each, for a run that was killed.

    origin: of `origin_of`; None: nothing is kept. label: of the target, in the names of the files. method: all else
    that decides the masks, which JSON can write. Several ranks go on after the last block that all of them have.
    """

    def __init__(
        self,
        origin: Scratch | None,
        reduce: Callable[[Tensor], Tensor] | None,
        label: str,
        method: Any,
        device: torch.device | str,
    ):
        self._origin, self._reduce, self._label, self._device = origin, reduce, label, device
        self._identity = json.dumps([origin and origin.identity, method], sort_keys=True, default=str)

    def load(self, order: Sequence[Sequence[str]]) -> dict[str, Done]:
        """What is there of these blocks, from the first on."""
        found: dict[str, Done] = {}
        count = 0
        for names in order if self._origin else ():
            block = self._read(count, names)
            if block is None:
                break
            count += 1
            found |= block
        if self._reduce:
            reached = torch.zeros(len(order) + 1, device=self._device)
            reached[count] = 1
            count = int(self._reduce(reached).nonzero()[0])
        if count:
            logger.info("going on after block %d of %d", count, len(order))
        return {name: found[name] for names in order[:count] for name in names}

    def _read(self, number: int, names: Sequence[str]) -> dict[str, Done] | None:
        kept = load_kept(self._path(number), self._identity, self._device)
        if kept is None or not {f"mask {name}" for name in names} <= kept[0].keys():
            return None
        tensor, _ = kept
        return {name: Done(tensor[f"mask {name}"], tensor.get(f"weight {name}")) for name in names}

    def save(self, number: int, block: Mapping[str, Done]) -> None:
        """The file of a block, whole or not at all."""
        if self._origin is None:
            return
        tensors = {f"mask {name}": done.kept for name, done in block.items()}
        tensors |= {f"weight {name}": done.updated for name, done in block.items() if done.updated is not None}
        save_kept(self._path(number), tensors, {"identity": self._identity})

    def forget(self) -> None:
        """Removes the files."""
        if self._origin is None:
            return
        for path in self._origin.path.parent.glob(self._path("*").name):
            path.unlink(missing_ok=True)

    def _path(self, number: int | str) -> Path:
        assert self._origin is not None, "only where files are kept"
        return self._origin.path.with_name(f"{self._origin.path.name}_{self._label}.block{number}")
