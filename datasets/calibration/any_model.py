"""Calibration batches of any model: from a folder of images, or from a function of the user's."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import count, islice
from pathlib import Path
from typing import Any

from configs.pruning import ExternalPruneConfig
from datasets.calibration.held_out import places
from datasets.calibration.own_data import Numbered, OwnData
from datasets.labelled.image_folder import Gather, ImageFolder
from datasets.labelled.sound_folder import SoundFolder
from datasets.place import ALONE, Place
from sparsity.errors import UserError

log = logging.getLogger(__name__)


class FolderBatches(OwnData):
    """Batches of a folder's images, or sounds, as a model takes them; see `OwnData`.

    preprocess, unlabelled: see `Gather`. path: of the folder (default: the configuration's `calibration`). choose: from
    how many items there are, the indices of those that are read (default: all). rate: samples a second of the sounds
    that the model hears; None: it sees images.
    """

    def __init__(
        self,
        config: ExternalPruneConfig,
        preprocess: Callable[..., Any],
        folder: Path,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
        *,
        path: str = "",
        choose: Callable[[int], Sequence[int]] | None = None,
        rate: int | None = None,
    ):
        path = path or config.calibration
        if rate:
            data = SoundFolder(path, seed=seed, rate=rate)
        else:
            data = ImageFolder(path, seed=seed, decoding=config.decoding)
        gather = Gather(data, preprocess)
        chosen = choose(len(data)) if choose else None
        super().__init__(data, gather, config, folder, num_batches, seed, place, chosen)
        self.unlabelled = gather.unlabelled


class LoaderBatches(Numbered):
    """At most `num_batches` batches an epoch of what a function of the user's returns; batch b goes to rank
    b % world_size. The same attributes as `Lockstep`.

    make: returns an iterable of batches; called for each epoch, on each rank, with `seed` and `epoch` if it has
    arguments of these names, and always to return the same for the same. The number of batches is its length; where it
    has none, `num_batches`. choose: from how many batches there are, which of them are read (default: all).
    """

    def __init__(
        self,
        make: Callable[..., Iterable[Any]],
        name: str,
        num_batches: int,
        seed: int,
        place: Place = ALONE,
        choose: Callable[[int], Sequence[int]] | None = None,
    ):
        self.make, self.name, self.seed, self.epoch = make, f"--calibration {name}", seed, 0
        self.place, self.unlabelled = place, None
        batches = self._made()
        length = len(batches) if isinstance(batches, Sized) else num_batches
        if length == 0:
            raise UserError(f"{self.name}: there is no batch in what it returns")
        self.chosen = sorted(choose(length) if choose else range(length))[:num_batches]
        self.batches = len(self.chosen)
        if self.batches < num_batches:
            log.info("%s has %d batches, fewer than the %d asked for", name, self.batches, num_batches)
        self.told = f"{name}: {self.batches} of the {length} batches that the function returns in an epoch"

    def __iter__(self) -> Iterator[Any]:
        found, places = 0, {place: own for place, own in zip(self.chosen, self.rounds, strict=True)}
        for batch in islice(self._made(), self.chosen[-1] + 1):
            if places.get(found):
                yield batch
            found += 1
        if found <= self.chosen[-1]:
            way_out = f"give --num_batches {found}, or return something with a length"
            raise UserError(f"{self.name}: ended after {found} of {self.batches} batches: {way_out}")

    def split(self, seed: int, most: int) -> tuple["SomeBatches", "SomeBatches"]:
        """Return the batches of epoch 0 without a tenth of them, and that tenth, of which at most `most` are read."""
        rest, held = places(self.batches, seed, "batch")
        return SomeBatches(self.at(0), rest.tolist()), SomeBatches(self.at(0), held[:most].tolist())

    def _made(self) -> Iterable[Any]:
        known = {"seed": self.seed, "epoch": self.epoch}
        wanted = inspect.signature(self.make).parameters
        batches = self.make(**{name: value for name, value in known.items() if name in wanted})
        if not isinstance(batches, Iterable):
            raise UserError(f"{self.name}: expected an iterable of batches, got {type(batches).__name__}")
        return batches


class SomeBatches:
    """The batches at some places of what a function of the user's returns; each pass reads the same. Batch i of all
    passes goes to rank i % world_size.

    places: in ascending order.
    """

    unit, batches_in_round = "batches", 1

    def __init__(self, whole: LoaderBatches, places: Sequence[int]):
        self.whole, self.places, self.samples = whole, places, len(places)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches of the first pass."""
        return self._pass(0)

    def stream(self, start: int = 0) -> Iterator[Any]:
        """Yield this rank's batches pass after pass, without end and without the first `start`."""
        for number in count():
            for batch in self._pass(number):
                if start:
                    start -= 1
                else:
                    yield batch

    def _pass(self, number: int) -> Iterator[Any]:
        turns = {place: number * len(self.places) + i for i, place in enumerate(self.places)}
        place = -1
        for place, batch in zip(range(self.places[-1] + 1), self.whole._made(), strict=False):
            if place in turns and self.whole.place.has(turns[place]):
                yield batch
        if place < self.places[-1]:
            raise UserError(f"{self.whole.name}: ended after {place + 1} batches, of which it has had more before")
