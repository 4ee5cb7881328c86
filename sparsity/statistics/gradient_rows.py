"""Gradient rows: the gradient of the loss on all prunable weights, a row for each mini-batch, never put side by side.

A row is the mean gradient over the batches of a round: with two sources read in lockstep, that of (L_general +
L_region) / 2. Rows are kept in memory, or one after another in a file that is mapped, which a run that was killed goes
on with. Either way they are rounded to the same type, so what is computed from them does not depend on the place. Each
rank keeps the rows whose batches it has read; rows that several ranks have parts of add up.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.files import write_atomic, writing
from sparsity.masks import state_digest
from sparsity.statistics.gradients import batch_generator, only_prunable, summed_gradients
from sparsity.statistics.inputs import untouched
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PIECE = {"cpu": 1 << 21}  # elements looked at together: enough for several threads, few enough for the cache
_LARGE_PIECE = 1 << 26
_REDUCED = 1 << 22  # columns that ranks add up together


@dataclass(frozen=True)
class Scratch:
    """Where a pass may keep what is too large for memory.

    path: of a file of this rank's own, which need not exist. identity: of all that decides the data; what was kept of
    other data is not used.
    """

    path: Path
    identity: str


class Rows:
    """The rows of all ranks: (n, p), a column for each weight, in prunable order and row-major in (out, in).

    own: rows of this rank, (rows, p), in memory or mapped. numbers: which of the n rows they are. images: in the
    batches of all rows of all ranks. device: where results are wanted. reduce: sums a tensor over ranks, which all call
    the same methods in the same order. forget: removes the file, whose rows stay readable as long as this lives.
    origin: identity of data, model and arithmetic, and a path beside which what is computed may be kept.
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
    ):
        self.n, self.width, self.images, self.forget, self.origin = n, own.shape[1], images, forget, origin
        self.device, self._reduce, self._own = torch.device(device), reduce or (lambda tensor: tensor), own
        self._numbers = torch.tensor(numbers, dtype=torch.long, device=self.device)
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
        return self._own[:, start:stop].to(self.device).float()


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
    """The rows of the model as it is, in evaluation mode. A row depends on its own batches alone.

    rounds: for each row, how many of its batches come here. budget: bytes of rows that are kept in memory; more go to
    the file of `scratch`. dtype: of DTYPES. generators, reduce: as in `sparsity.statistics.gradients`.

    Raises UserError where the rows find no room, without batches, for a weight that gets no gradient, and for NaN or
    Inf, naming the layer.
    """
    generators = generators or (lambda number: batch_generator(42, number))
    kind, own = DTYPES[dtype], [number for number, count in enumerate(rounds) if count]
    device = next(iter(view.weights.values())).parameter.device
    origin = scratch and Scratch(scratch.path, _identity(view, rounds, kind, scratch.identity))
    if fit(view.numel, rounds, dtype, budget, scratch and scratch.path.parent):
        store = _Memory(len(own), view.numel, kind)
    else:
        assert origin is not None, "`fit` refuses rows that find no room"
        store = _File(origin, view.numel, kind)
    counts = torch.tensor(rounds, dtype=torch.float64, device=device)
    counts = (reduce(counts) if reduce else counts).tolist()
    if len(store.images) < len(own):
        shares = [(rounds[number], counts[number]) for number in own]
        _collect(view, enumerate(batches), store, shares, generators, idle_is_fine=reduce is not None)
    images = torch.tensor(float(sum(store.images)), device=device)
    images = int(reduce(images) if reduce else images)
    if not images:
        raise UserError("there are no calibration batches")
    read = own[: len(store.images)]
    n = len(rounds) if reduce else len(read)
    place = {"device": device, "reduce": reduce, "forget": store.remove, "origin": origin}
    return Rows(store.rows(), read, n, images, **place)


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
    older = sum(path.stat().st_size for path in existing.glob(f"*{_File.SUFFIX}"))
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
    store: "_Memory | _File",
    shares: Sequence[tuple[int, float]],
    generators: Callable[[int], torch.Generator],
    idle_is_fine: bool,
) -> None:
    """The rows that the store does not have yet. shares: for each row, how many batches come here, and on all ranks."""
    idle = set(view.weights)
    with only_prunable(view), summed_gradients(view) as sums:
        for place, (here, together) in enumerate(shares):
            batches = islice(numbered, here)
            if place < len(store.images):
                deque(batches, maxlen=0)  # read, since what follows depends on the order, but not used
                continue
            sums.clear()
            images = _backward(view, batches, generators)
            if not images:
                break
            idle -= set(sums)
            store.append(_pieces(view, sums, together), images)
    if idle and not idle_is_fine and store.images:
        raise UserError(f"layer {next(name for name in view.weights if name in idle)!r} got no gradient from the loss")


def _backward(
    view: PrunableView, batches: Iterable[tuple[int, Any]], generators: Callable[[int], torch.Generator]
) -> int:
    """Run the batches backward, whose gradients `summed_gradients` takes; the number of images."""
    images = 0
    for number, batch in batches:
        # What a loss moves (momentum copies, queues) starts anew for each batch: rows depend on their own alone.
        with untouched(view.model, view.moved_by_loss), torch.enable_grad():
            view.loss(batch, generators(number)).backward()
        images += batch_images(batch)
    return images


def _pieces(view: PrunableView, sums: Mapping[str, Tensor], count: float) -> Iterator[Tensor]:
    """The row, weight after weight: the sums of the gradients divided by `count`."""
    for name, weight in view.weights.items():
        gradient = sums.get(name)
        if gradient is None:
            yield torch.zeros(weight.numel)
            continue
        if not gradient.isfinite().all():
            raise UserError(f"the gradient of layer {name!r} holds NaN or Inf")
        yield weight.as_matrix(gradient).reshape(-1) / count


def _identity(view: PrunableView, rounds: Sequence[int], dtype: torch.dtype, data: str) -> str:
    """Digest of all that decides the rows: data, model, arithmetic."""
    device = next(iter(view.weights.values())).parameter.device.type
    arithmetic = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "plain"
    facts = [data, state_digest(view.model), list(view.weights), list(rounds), str(dtype), arithmetic]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _checksum(account: Mapping[str, Any]) -> str:
    """SHA-256 over all of an account but its checksum."""
    facts = {name: value for name, value in account.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Memory:
    """Rows in memory. images: of the batches of each row that is there."""

    def __init__(self, count: int, width: int, dtype: torch.dtype):
        self.images: list[int] = []
        self._rows = torch.empty(count, width, dtype=dtype)

    def append(self, pieces: Iterable[Tensor], images: int) -> None:
        """Adds a row."""
        start, row = 0, self._rows[len(self.images)]
        for piece in pieces:
            row[start : start + len(piece)] = piece
            start += len(piece)
        self.images.append(images)

    def rows(self) -> Tensor:
        return self._rows[: len(self.images)]

    def remove(self) -> None:
        pass


class _File:
    """Rows in a file, one after another, with an account of those that are whole beside it.

    The account is replaced after the row has reached the disk, so that a kill at any moment leaves whole rows. Rows of
    another identity are written over.
    """

    SUFFIX = ".rows"

    def __init__(self, origin: Scratch, width: int, dtype: torch.dtype):
        self.path, self.account = origin.path.with_suffix(self.SUFFIX), origin.path.with_suffix(".json")
        self._identity, self._width, self._dtype = origin.identity, width, dtype
        self._digests: list[str] = []  # of the rows
        self.images: list[int] = self._found()
        if self.images:
            logger.info("%s: going on after %d gradient rows", self.path, len(self.images))
        else:
            # Another file, not the old one emptied: rows that are still mapped must not change.
            self._digests = []
            self.remove()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def _found(self) -> list[int]:
        try:
            account, size = json.loads(self.account.read_text()), self.path.stat().st_size
        except (OSError, ValueError, RecursionError):
            return []
        if not isinstance(account, dict) or account.get("identity") != self._identity:
            return []
        self._digests = account.get("digests", [])
        images, text = account.get("images", []), _checksum(account)
        if account.get("checksum") != text or size < len(images) * self._bytes:
            return []
        return images if all(map(self._intact, range(len(images)))) else []

    def _intact(self, row: int) -> bool:
        """Whether a row is as it was written."""
        sha = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(row * self._bytes)
            left = self._bytes
            while left and (piece := file.read(min(left, _PIECE["cpu"]))):
                sha.update(piece)
                left -= len(piece)
        return sha.hexdigest() == self._digests[row]

    @property
    def _bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def append(self, pieces: Iterable[Tensor], images: int) -> None:
        """Adds a row, and accounts for it."""
        sha = hashlib.sha256()
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(len(self.images) * self._bytes)
            for piece in pieces:
                written = piece.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().data
                file.write(written)
                sha.update(written)
            file.flush()
            os.fsync(file.fileno())
        self.images.append(images)
        self._digests.append(sha.hexdigest())
        account = {"identity": self._identity, "images": self.images, "digests": self._digests}
        write_atomic(self.account, json.dumps(account | {"checksum": _checksum(account)}).encode())

    def rows(self) -> Tensor:
        count = len(self.images)
        mapped = torch.from_file(str(self.path), shared=False, size=count * self._width, dtype=self._dtype)
        return mapped.view(count, self._width)

    def remove(self) -> None:
        self.account.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
