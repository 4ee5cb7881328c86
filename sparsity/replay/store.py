"""Tensors that are kept for a while: in memory up to a budget, beyond it in a file that vanishes with the process."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sparsity.files import writing


@dataclass(eq=False)
class Kept:
    """A tensor that was put away. users: how many still need it. span: its bytes, or where they are in the file."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    span: Tensor | int
    users: int = 0


class Store:
    """Keeps values and strides of tensors on the processor.

    budget: bytes that are held in memory (None: no limit). folder: of a file without a name that takes what is beyond;
    None: memory takes it all the same.
    """

    def __init__(self, budget: int | None = None, folder: Path | None = None):
        self.held = 0  # bytes in memory
        self._budget, self._folder = budget, folder
        self._file: IO[bytes] | None = None
        self._end, self._free = 0, dict[int, list[int]]()  # of the file; bytes -> places of that size

    def put(self, tensor: Tensor) -> Kept:
        """Return a copy that later changes of the tensor do not reach."""
        tensor = tensor.detach()
        extents = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in extents) if tensor.numel() else 0
        # All that lies between the first and the last element: strides are kept, also of expanded tensors.
        span = tensor.as_strided((extent,), (1,), tensor.storage_offset()).to("cpu", copy=True)
        nbytes = span.numel() * span.element_size()
        kept = Kept(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, nbytes, span)
        if self._folder is not None and self._budget is not None and self.held + nbytes > self._budget:
            kept.span = self._write(span)
        else:
            self.held += nbytes
        return kept

    def get(self, kept: Kept) -> Tensor:
        """Return the tensor in memory of its own, on the device where it was."""
        span = self._read(kept, kept.span) if isinstance(kept.span, int) else kept.span
        return span.to(kept.device, copy=True).as_strided(kept.size, kept.stride)

    def release(self, kept: Kept) -> None:
        """Note that one user less needs it; without any, its room is free."""
        kept.users -= 1
        if kept.users > 0:
            return
        if isinstance(kept.span, int):
            self._free.setdefault(kept.nbytes, []).append(kept.span)
        else:
            self.held -= kept.nbytes
        kept.span = 0

    def close(self) -> None:
        """Give up the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, span: Tensor) -> int:
        assert self._folder is not None, "only with a folder"
        nbytes = span.numel() * span.element_size()
        with writing(self._folder / "captured calls"):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it is kept open)
            free = self._free.get(nbytes)
            place = free.pop() if free else self._end
            self._end = max(self._end, place + nbytes)
            self._file.seek(place)
            self._file.write(span.view(torch.uint8).numpy().data)
        return place

    def _read(self, kept: Kept, place: int) -> Tensor:
        assert self._file is not None, "what lies in the file was written to it"
        span = torch.empty(kept.nbytes, dtype=torch.uint8)
        self._file.seek(place)
        if self._file.readinto(span.numpy()) != kept.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
            raise OSError(f"{self._folder}: the file with captured calls was cut short")
        return span.view(kept.dtype)
