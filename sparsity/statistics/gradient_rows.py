"""Gradient rows: the gradient of the loss on all prunable weights, a row for each mini-batch, never put side by side.

A row is the mean gradient over the batches of a round: with two sources read in lockstep, that of (L_general +
L_region) / 2. Rows are kept in memory, or one after another in a file that is mapped, which a run that was killed goes
on with. Either way they are rounded to the same type, so what is computed from them does not depend on the place. Each
rank keeps the rows whose batches it has read; rows that several ranks have parts of add up.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.masks import state_digest
from sparsity.statistics.checks import (
    IDLE,
    NO_BATCHES,
    finite,
    look,
    not_finite,
    not_reached,
    summed,
    warn_ended_early,
)
from sparsity.statistics.gradients import batch_generator, only_prunable, summed_gradients
from sparsity.statistics.inputs import untouched
from sparsity.statistics.row_stores import File, Memory, Scratch
from sparsity.view import PrunableView

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PIECE = {"cpu": 1 << 21}  # elements looked at together: enough for several threads, few enough for the cache
_LARGE_PIECE = 1 << 26
_REDUCED = 1 << 22  # columns that ranks add up together


class Rows:
    """The rows of all ranks: (n, p), a column for each weight, in prunable order and row-major in (out, in).

    own: rows of this rank, (rows, p), in memory or mapped. numbers: which of the n rows they are. images: in the
    batches of all rows of all ranks. device: where results are wanted. reduce: sums a tensor over ranks, which all call
    the same methods in the same order. forget: removes the file, whose rows stay readable as long as this lives.
    origin: identity of data, model and arithmetic, and a path beside which what is computed may be kept. factors: of
    `own`, (rows,), where they are not yet means.
    """

    def __init__(
        self,
        own: Tensor,
        numbers: Sequence[int],
        n: int,
        images: int,
        *,
        device: torch.device | str = "cpu",
        reduce: Callable[[Tensor], Tensor] | None = None,
        forget: Callable[[], None] = lambda: None,
        origin: Scratch | None = None,
        factors: Tensor | None = None,
    ):
        self.n, self.width, self.images, self.forget, self.origin = n, own.shape[1], images, forget, origin
        self.device, self._reduce, self._own = torch.device(device), reduce or (lambda tensor: tensor), own
        self._numbers = torch.tensor(numbers, dtype=torch.long, device=self.device)
        self._factors = None if factors is None else factors.to(self.device).float()[:, None]
        self._whole = reduce is None and list(numbers) == list(range(n))
        self.independent = self._whole and self.device.type == "cpu"  # columns can be read in any order, by threads
        self._sum, self._summed = torch.empty(self.width, device=self.device), 0  # so many columns of it are there

    @property
    def batch_size(self) -> float:
        """Images of a mini-batch, of both sources together."""
        return self.images / self.n

    def piece(self) -> int:
        """How many columns are best looked at together."""
        return max(1, _PIECE.get(self.device.type, _LARGE_PIECE) // self.n)

    def sum(self, start: int = 0, stop: int | None = None) -> Tensor:
        """(stop - start,): the sum of all rows, in some columns.

        It is computed once, from left to right as far as it is asked for: what then looks at the same columns finds
        them in the processor's cache.
        """
        stop = self.width if stop is None else stop
        while self._summed < stop:
            end = min(self._summed + (self.piece() if self._whole else _REDUCED), self.width)
            self._sum[self._summed : end] = self._reduce(self._part(self._summed, end).sum(dim=0))
            self._summed = end
        return self._sum[start:stop]

    def product(self, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
        """(n,) in float64: the rows times a vector that comes as (first column, piece)."""
        total = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        for first, vector in pieces:
            for start in range(0, len(vector), self.piece()):
                values = vector[start : start + self.piece()].float()
                part = self._part(first + start, first + start + len(values))
                total.index_add_(0, self._numbers, (part @ values).double())
        return self._reduce(total)

    def read(self, start: int, stop: int) -> Tensor:
        """(n, stop - start), float32: some columns of all rows, which must not be written to."""
        part = self._part(start, stop)
        if self._whole:
            return part
        rows = torch.zeros(self.n, stop - start, device=self.device).index_copy_(0, self._numbers, part)
        return self._reduce(rows)

    def _part(self, start: int, stop: int) -> Tensor:
        part = self._own[:, start:stop].to(self.device).float()
        return part if self._factors is None else part * self._factors


def gradient_rows(
    view: PrunableView,
    batches: Iterable[Any],
    *,
    rounds: Sequence[int],
    budget: int,
    dtype: str = "float32",
    scratch: Scratch | None = None,
    generators: Callable[[int], torch.Generator] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Rows:
    """Return the rows of the model as it is, in evaluation mode. A row depends on its own batches alone.

    rounds: for each row, how many of its batches come here; where fewer come, the rows are of those that did, with a
    warning. budget: bytes of rows that are kept in memory; more go to the file of `scratch`. dtype: of DTYPES.
    generators, reduce: as in `sparsity.statistics.gradients`.

    Raises UserError where the rows find no room, without batches, and, naming all layers concerned, for weights that
    get no gradient on any rank (a warning after the first row) and for NaN or Inf, as soon as they come.
    """
    generators = generators or (lambda number: batch_generator(42, number))
    kind, own = DTYPES[dtype], [number for number, count in enumerate(rounds) if count]
    device = view.device
    origin = scratch and Scratch(scratch.path, _identity(view, rounds, kind, scratch.identity))
    if fit(view.numel, rounds, dtype, budget, scratch and scratch.path.parent):
        store = Memory(len(own), view.numel, kind)
    else:
        assert origin is not None, "`fit` refuses rows that find no room"
        store = File(origin, view.numel, kind)
    announced = summed(rounds, device, reduce)
    shares = [(rounds[number], announced[number]) for number in own] if len(store.images) < len(own) else []
    _collect(view, enumerate(batches), store, shares, generators, reduce)
    read = own[: len(store.images)]
    warn_ended_early(sum(store.batches), sum(rounds))

    # What came, on all ranks together: batches of each round, layers with a gradient, images.
    batches_of = dict(zip(read, store.batches, strict=True))
    here = [batches_of.get(number, 0) for number in range(len(rounds))]
    numbers = [*here, *(int(name in store.reached) for name in view.weights), sum(store.images)]
    *counts, images = summed(numbers, device, reduce)
    came, ranks = counts[: len(rounds)], counts[len(rounds) :]
    if not images:
        raise UserError(NO_BATCHES)
    idle = [name for name, reached in zip(view.weights, ranks, strict=True) if not reached]
    if idle:
        raise not_reached(IDLE, idle)
    there = [number for number, count in enumerate(came) if count]  # rounds of which no rank read anything are no rows
    factors = torch.tensor([announced[number] / came[number] for number in read])
    place = {"device": device, "reduce": reduce, "forget": store.remove, "origin": origin}
    place["factors"] = None if (factors == 1).all() else factors
    return Rows(store.rows(), [there.index(number) for number in read], len(there), images, **place)


def fit(width: int, rounds: Sequence[int], dtype: str, budget: int, folder: Path | None, held: int = 1) -> bool:
    """Whether this rank's rows go to memory; else they go to a file in the folder.

    held: how many sets of rows there are at a time. Raises UserError, naming the largest number of rows that there is
    room for, where they fit neither. Nothing is written.
    """
    row, own = held * width * DTYPES[dtype].itemsize, sum(count > 0 for count in rounds)
    if own * row <= budget:
        return True
    free = room(folder) if folder else 0
    if len(rounds) * row <= free:
        return False
    ranks = len(rounds) / own
    largest = int(max(budget // row * ranks, free // row))
    where = f"{human(free)} free in {folder}" if folder else "no folder to write to"
    raise UserError(
        f"--num_batches {len(rounds)}: the gradients of {len(rounds)} batches on {width:,} weights need "
        f"{human(len(rounds) * row)}, more than --memory_budget {human(budget)}, with {where}: "
        + (f"at most --num_batches {largest} fits" if largest else "not even one batch fits; raise --memory_budget")
    )


def room(folder: Path) -> int:
    """Bytes that rows can take in a folder, which need not exist yet: what is free, and older rows."""
    existing = Path(os.path.abspath(folder))
    older = sum(path.stat().st_size for path in existing.glob(f"*{File.SUFFIX}"))
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free + older


def human(count: float) -> str:
    """Bytes, as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# Fields with an entry for each image; "pixel_values" of models that flatten images of any size has one for each patch.
_IMAGES = ("image", "image_grid_thw", "pixel_values")


def batch_images(batch: Any) -> int:
    """How many images a batch has: the length of the first of its fields _IMAGES, else of what comes first."""
    if isinstance(batch, Mapping):
        return len(next((batch[field] for field in _IMAGES if field in batch), next(iter(batch.values()))))
    return len(batch) if isinstance(batch, Tensor) else batch_images(next(iter(batch)))


def _collect(
    view: PrunableView,
    numbered: Iterator[tuple[int, Any]],
    store: Memory | File,
    shares: Sequence[tuple[int, int]],
    generators: Callable[[int], torch.Generator],
    reduce: Callable[[Tensor], Tensor] | None,
) -> None:
    """Add the rows that the store does not have yet. shares: for each row, how many batches come here, and on all
    ranks: the sum of its gradients is divided by the latter.
    """
    looked = False

    def report() -> None:
        look(IDLE, "gradient", {name: (name in store.reached, True) for name in view.weights}, device, reduce)

    device = view.device
    with only_prunable(view), summed_gradients(view) as sums:
        for place, (here, together) in enumerate(shares):
            batches = islice(numbered, here)
            if place < len(store.images):
                deque(batches, maxlen=0)  # read, since what follows depends on the order, but not used
                continue
            sums.clear()
            count, images = _backward(view, batches, generators)
            if not count:
                break
            bad = [name for name, gradient in sums.items() if not finite(gradient)]
            if bad:
                raise not_finite("gradient", [name for name in view.weights if name in bad])
            store.append(_pieces(view, sums, together), images, count, sums)
            if not looked:
                report()
                looked = True
    if not looked:
        report()


def _backward(
    view: PrunableView, batches: Iterable[tuple[int, Any]], generators: Callable[[int], torch.Generator]
) -> tuple[int, int]:
    """Run the batches backward, whose gradients `summed_gradients` takes; how many there were, and their images."""
    count, images = 0, 0
    for number, batch in batches:
        # What a loss moves (momentum copies, queues) starts anew for each batch: rows depend on their own alone.
        with untouched(view.model, view.moved_by_loss), torch.enable_grad():
            view.loss(batch, generators(number)).backward()
        count += 1
        images += batch_images(batch)
    return count, images


def _pieces(view: PrunableView, sums: Mapping[str, Tensor], count: int) -> Iterator[Tensor]:
    """The row, weight after weight: the sums of the gradients divided by `count`."""
    for name, weight in view.weights.items():
        gradient = sums.get(name)
        yield torch.zeros(weight.numel) if gradient is None else weight.as_matrix(gradient).reshape(-1) / count


def _identity(view: PrunableView, rounds: Sequence[int], dtype: torch.dtype, data: str) -> str:
    """Digest of all that decides the rows: data, model, arithmetic."""
    device = view.device.type
    arithmetic = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "plain"
    facts = [data, state_digest(view.model), list(view.weights), list(rounds), str(dtype), arithmetic]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
