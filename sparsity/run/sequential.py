"""Layer-wise methods block by block: each block is calibrated on the outputs of the pruned blocks before it.

Memory holds the statistics of one block. They come from `sparsity.replay`, or from a pass through the whole model for
each block. What is done with a block is written beside the results, so that a run that was killed goes on after it.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.bits import Bits
from sparsity.masks import state_digest
from sparsity.resume.kept import StoredTensors, load_kept, save_kept
from sparsity.solvers.share import ALONE, Share
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


class Solved(NamedTuple):
    """Hold what a weight becomes.

    kept: bool (out, in). updated: (out, in), or None where the kept weights stay. change: what is added to the biases
    of its layers, (out,), or None. errors: of `sparsity.reconstruction.errors`, as a tensor, or None.
    """

    kept: Tensor
    updated: Tensor | None = None
    change: Tensor | None = None
    errors: Tensor | None = None


# What the layers of a stage become -> the same once they are trained, and key -> what other parameters become.
Train = Callable[[dict[str, Solved]], tuple[dict[str, Solved], dict[str, Tensor]]]


def by_blocks(
    order: Sequence[Sequence[str]],
    measure: Callable[[Sequence[str]], dict[str, dict[str, Tensor]]],
    prune: Callable[[str, Mapping[str, Tensor]], Solved],
    done: "Blocks",
    share: Share = ALONE,
    train: "Train | None" = None,
) -> None:
    """Prune one stage after the other, but for those that are done.

    measure: names -> name of a statistic -> name -> tensor, in the model as it is then. prune: (name, its statistics by
    name) -> what it becomes. share: of the layers of a stage. train: what a stage becomes once its layers are pruned.
    """
    done.load(order)
    for number, names in enumerate(order):
        if names[0] in done.kept:
            continue
        logger.info("block %d of %d: %d layers, from %s", number + 1, len(order), len(names), names[0])
        statistics = measure(names)

        def solve(name: str, statistics: dict[str, dict[str, Tensor]] = statistics) -> Solved:
            take = dict.pop if share.ranks == 1 else dict.__getitem__  # each is freed when its layer is done
            return prune(name, {key: take(found, name) for key, found in statistics.items() if name in found})

        solved = share.solve(names, solve, len(Solved._fields))
        block, trained = {name: Solved(*fields) for name, fields in solved.items()}, {}
        if train is not None:
            block, trained = train(block)
        done.save(number, block, trained)


class Blocks:
    """Keep what pruned stages have become: masks are held packed; updated weights lie in files, one a stage, from which
    each is read when it is asked for.

    origin: of `origin_of`, for a run that is killed and goes on; None: files are temporary, in `folder` (None: of the
    system). label: of the target, in the names of the files. method: all else that decides the masks, which JSON can
    write. reduce: sums a tensor over ranks, which go on after the last stage that all of them have.
    """

    def __init__(
        self,
        view: PrunableView,
        origin: Scratch | None = None,
        *,
        folder: Path | None = None,
        label: str = "",
        method: Any = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self._view, self._origin, self._reduce, self._label, self._folder = view, origin, reduce, label, folder
        self._identity = json.dumps([origin and origin.identity, method], sort_keys=True, default=str)
        self._temporary: tempfile.TemporaryDirectory | None = None
        self.kept: dict[str, Bits] = {}  # in the parameter's own layout
        self.updates = StoredTensors()  # likewise
        self.biases: dict[str, Tensor] = {}  # key of a bias, or of another parameter that changes -> what it becomes
        self.changed: dict[int, list[str]] = {}  # number of a stage -> keys of `biases`
        self.errors: dict[str, Tensor] = {}

    def load(self, order: Sequence[Sequence[str]]) -> None:
        """Find the stages that are there, from the first on."""
        found: list[tuple[dict[str, Bits], list[str], dict[str, Tensor]]] = []
        for number, names in enumerate(order if self._origin else ()):
            block = self._read(number, names)
            if block is None:
                break
            found.append(block)
        count = len(found)
        if self._reduce:
            reached = torch.zeros(len(order) + 1, device=self._view.device)
            reached[count] = 1
            count = int(self._reduce(reached).nonzero()[0])
        if count:
            logger.info("going on after block %d of %d", count, len(order))
        for number, (kept, updated, small) in enumerate(found[:count]):
            self.kept |= kept
            biases = _named(small, "bias ")
            self.biases, self.changed[number] = self.biases | biases, list(biases)
            self.errors |= _named(small, "errors ")
            self.updates.add(self._path(number), {name: f"weight {name}" for name in updated})

    def _read(self, number: int, names: Sequence[str]) -> tuple[dict[str, Bits], list[str], dict[str, Tensor]] | None:
        """Return the masks of a stage, the names of its updated weights, and what else is stored; None where they are
        not there.
        """
        stored = load_kept(self._path(number), self._identity)
        if stored is None or not {f"mask {name}" for name in names} <= stored[0].keys():
            return None
        small = {key: value for key, value in stored[0].items() if not key.startswith(("mask ", "weight "))}
        masks = {name: Bits.of(stored[0][f"mask {name}"]) for name in names}
        return masks, [name for name in names if f"weight {name}" in stored[0]], small

    def save(self, number: int, block: Mapping[str, Solved], trained: Mapping[str, Tensor] | None = None) -> None:
        """Add a stage: name -> what it becomes. Its file is written whole or not at all.

        trained: key -> what other parameters become, biases among them. The parameters must hold the dense weights and
        biases.
        """
        weights = self._view.weights
        masks = {name: weights[name].as_stored(each.kept) for name, each in block.items()}
        updates = {n: weights[n].as_stored(each.updated) for n, each in block.items() if each.updated is not None}
        biases = biases_of(self._view, block) | dict(trained or {})
        biases = {key: new.cpu() for key, new in biases.items()}
        errors = {name: each.errors.cpu() for name, each in block.items() if each.errors is not None}
        if updates or self._origin:
            tensors = {f"mask {name}": mask for name, mask in masks.items()}
            tensors |= {f"weight {name}": new for name, new in updates.items()}
            tensors |= {f"bias {key}": new for key, new in biases.items()}
            tensors |= {f"errors {name}": values for name, values in errors.items()}
            save_kept(self._path(number), tensors, {"identity": self._identity})
            self.updates.add(self._path(number), {name: f"weight {name}" for name in updates})
        self.kept |= {name: Bits.of(mask) for name, mask in masks.items()}
        self.biases, self.changed[number] = self.biases | biases, list(biases)
        self.errors |= errors

    def pruned(self, name: str) -> Tensor:
        """Return what a weight becomes, in the parameter's own layout and on its device.

        Its parameter must hold the dense weight.
        """
        dense = self._view.weights[name].parameter.detach()
        if name in self.updates:
            return self.updates[name].to(dense)
        return dense * self.kept[name].tensor().to(dense.device)

    def forget(self) -> None:
        """Remove the files; what they held can be read as long as this lives."""
        if self._temporary is not None:
            self._temporary.cleanup()
        forget_blocks(self._origin, self._label)

    def _path(self, number: int | str) -> Path:
        if self._origin is not None:
            return _file(self._origin, self._label, number)
        if self._temporary is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix=".updated_weights_", dir=self._folder)
        return Path(self._temporary.name) / f"block{number}"


def forget_blocks(origin: Scratch | None, label: str = "*") -> None:
    """Remove the files of the stages that were kept for a target, or for all; what is open can still be read."""
    if origin is not None:
        for path in origin.path.parent.glob(_file(origin, label, "*").name):
            path.unlink(missing_ok=True)


def _file(origin: Scratch, label: str, number: int | str) -> Path:
    return origin.path.with_name(f"{origin.path.name}_{label}.block{number}")


def biases_of(view: PrunableView, block: Mapping[str, Solved]) -> dict[str, Tensor]:
    """Return key -> what each bias becomes that changes with its layer. The parameters must hold the dense biases."""
    changes = ((view.weights[name].biases, each.change) for name, each in block.items() if each.change is not None)
    return {
        key: (bias.detach().to(change) + change).to(bias.dtype)
        for biases, change in changes
        for key, bias in biases.items()
    }


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose keys begin so, by what follows."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class PrunedStages:
    """Puts pruned weights into the model, and gives every parameter its own storage back, which is never written to.

    Call it with the numbers of the stages that are wanted pruned: these are, and all others dense. Use it as a context
    manager, after which all are dense.
    """

    def __init__(self, view: PrunableView, order: Sequence[Sequence[str]], done: Blocks):
        self._view, self._order, self._done, self._parameters = view, order, done, view.parameters
        self._dense: dict[int, list[tuple[torch.nn.Parameter, Tensor]]] = {}  # of the stages that are pruned now

    def __call__(self, stages: Collection[int]) -> None:
        for number in [number for number in self._dense if number not in stages]:
            for parameter, data in self._dense.pop(number):
                parameter.data = data
        for number in [number for number in stages if number not in self._dense]:
            own = self._dense[number] = []
            for name in self._order[number]:
                weight = self._view.weights[name]
                pruned = self._done.pruned(name)
                own.append((weight.parameter, weight.parameter.data))
                weight.parameter.data = pruned.contiguous()
            for key in self._done.changed.get(number, ()):
                parameter = self._parameters[key]
                if not any(parameter is changed for changed, _ in own):
                    own.append((parameter, parameter.data))
                    parameter.data = self._done.biases[key].to(parameter)
        torch.clear_autocast_cache()  # it holds what weights were, also under an autocast of the caller's

    def __enter__(self) -> "PrunedStages":
        return self

    def __exit__(self, *exception: object) -> None:
        self(())
