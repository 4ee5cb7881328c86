"""Stores of gradient rows: in memory, or in a file from which a killed run resumes."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.files import write_atomic, writing

logger = logging.getLogger(__name__)

_PIECE = 1 << 21  # bytes read together


@dataclass(frozen=True)
class Scratch:
    """The place for data of a pass that is too large for memory.

    path: of a file of this rank's own, which need not exist. identity: of all that decides the data; what was kept of
    other data is not used.
    """

    path: Path
    identity: str


def _checksum(account: Mapping[str, Any]) -> str:
    """SHA-256 over all of an account but its checksum."""
    facts = {name: value for name, value in account.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Memory:
    """Rows in memory. images, batches: those of each row that is there. reached: layers with a gradient in any row."""

    def __init__(self, count: int, width: int, dtype: torch.dtype):
        self.images: list[int] = []
        self.batches: list[int] = []
        self.reached: set[str] = set()
        self._rows = torch.empty(count, width, dtype=dtype)

    def append(self, pieces: Iterable[Tensor], images: int, batches: int, reached: Collection[str]) -> None:
        """Add a row."""
        start, row = 0, self._rows[len(self.images)]
        for piece in pieces:
            row[start : start + len(piece)] = piece
            start += len(piece)
        self.images.append(images)
        self.batches.append(batches)
        self.reached |= set(reached)

    def rows(self) -> Tensor:
        return self._rows[: len(self.images)]

    def remove(self) -> None:
        pass


class File:
    """Rows in a file, one after another, with an account of those that are whole beside it.

    The account is replaced after the row has reached the disk, so that a kill at any moment leaves whole rows. Rows of
    another identity are written over.
    """

    SUFFIX = ".rows"

    def __init__(self, origin: Scratch, width: int, dtype: torch.dtype):
        self.path, self.account = origin.path.with_suffix(self.SUFFIX), origin.path.with_suffix(".json")
        self._identity, self._width, self._dtype = origin.identity, width, dtype
        self._digests: list[str] = []  # of the rows
        self.images: list[int] = []
        self.batches: list[int] = []
        self.reached: set[str] = set()
        if self._found():
            logger.info("%s: going on after %d gradient rows", self.path, len(self.images))
        else:
            # Another file, not the old one emptied: rows that are still mapped must not change.
            self.remove()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def _found(self) -> bool:
        """Take over what is there of this identity; whether anything is."""
        try:
            account, size = json.loads(self.account.read_text()), self.path.stat().st_size
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(account, dict) or account.get("identity") != self._identity:
            return False
        images, digests = account.get("images", []), account.get("digests", [])
        if (
            account.get("checksum") != _checksum(account)
            or size < len(images) * self._bytes
            or "reached" not in account
        ):
            return False
        if not all(self._intact(row, digest) for row, digest in enumerate(digests)):
            return False
        self.images, self.batches, self._digests = images, account["batches"], digests
        self.reached = set(account["reached"])
        return bool(images)

    def _intact(self, row: int, digest: str) -> bool:
        """Whether a row is as it was written."""
        sha = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(row * self._bytes)
            left = self._bytes
            while left and (piece := file.read(min(left, _PIECE))):
                sha.update(piece)
                left -= len(piece)
        return sha.hexdigest() == digest

    @property
    def _bytes(self) -> int:
        return self._width * self._dtype.itemsize

    def append(self, pieces: Iterable[Tensor], images: int, batches: int, reached: Collection[str]) -> None:
        """Add a row, and account for it."""
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
        self.batches.append(batches)
        self.reached |= set(reached)
        self._digests.append(sha.hexdigest())
        account = {"identity": self._identity, "images": self.images, "batches": self.batches}
        account |= {"reached": sorted(self.reached), "digests": self._digests}
        write_atomic(self.account, json.dumps(account | {"checksum": _checksum(account)}).encode())

    def rows(self) -> Tensor:
        count = len(self.images)
        mapped = torch.from_file(str(self.path), shared=False, size=count * self._width, dtype=self._dtype)
        return mapped.view(count, self._width)

    def remove(self) -> None:
        self.account.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
