"""Samples to batches, and the account of images that could not be read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from datasets.transforms import Pixels
from sparsity.errors import UserError
from sparsity.files import append

log = logging.getLogger(__name__)


class Skipped(NamedTuple):  # a tuple of texts passes unharmed through pinning and moving to a device
    """The item that a dataset returns in place of a sample whose image cannot be decoded."""

    path: str
    reason: str


def collate(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """Stack the tensors of the samples, field by field.

    Samples that were skipped make the batch smaller, and stand in the additional field "skipped" (absent where there is
    none), which `SkippedImages.watch` takes out again; it is the only field where every sample was skipped.
    """
    read, skipped = _split(items)
    if not read:
        return skipped
    images = {"image": _stacked(read)} if "image" in read[0] else {}  # in a worker: in shared memory
    fields = [{name: value for name, value in item.items() if name not in images} for item in read]
    return images | trim_text(default_collate(fields)) | skipped


def collate_regions(items: Sequence[dict[str, Any] | Skipped]) -> dict[str, Any]:
    """Stack the images of the samples, (B, 3, H, W), and the fields of all their regions, (R, ...).

    `idx_to_group_img` (R,) says which image a region belongs to. Skipped samples as in `collate`.
    """
    read, skipped = _split(items)
    if not read:
        return skipped
    regions = [region for item in read for region in item["regions"]]
    owner = [i for i, item in enumerate(read) for _ in item["regions"]]
    batch = {name: torch.stack([torch.as_tensor(region[name]) for region in regions]) for name in regions[0]}
    batch |= {"image": _stacked(read), "idx_to_group_img": torch.tensor(owner)}
    return trim_text(batch) | skipped


def trim_text(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut the text fields (B, T) to the longest text of the batch: padding costs time and changes nothing."""
    if "text_atts" not in batch:
        return batch
    longest = int(batch["text_atts"].sum(1).max())
    return batch | {k: batch[k][:, :longest] for k in ("text_ids", "text_atts", "text_ids_masked") if k in batch}


def _stacked(items: Sequence[dict[str, Any]]) -> Tensor | Pixels:
    """Images of samples, (B, 3, H, W)."""
    images = [item["image"] for item in items]
    if isinstance(images[0], Pixels):
        return Pixels(default_collate([image.grey for image in images]), images[0].statistics)
    return default_collate(images)


def _split(items: Sequence[dict[str, Any] | Skipped]) -> tuple[list[dict[str, Any]], dict[str, list[Skipped]]]:
    skipped = [item for item in items if isinstance(item, Skipped)]
    return [item for item in items if not isinstance(item, Skipped)], {"skipped": skipped} if skipped else {}


class SkippedImages:
    """Counts and lists the images that could not be decoded, and stops a run that loses too many.

    Args:
        list_path: file with a line for each such image, usually `<output_dir>/skipped.txt`, which several accounts of
            one process may share; there is none without such an image.
        expected: samples that this process will read, of which `max_skipped` is the share.
        max_skipped: share of them that may be skipped, 0 to 1.
    """

    def __init__(self, list_path: str | Path, expected: int, max_skipped: float = 0.01):
        if not 0 <= max_skipped <= 1:
            raise UserError(f"max_skipped must be a fraction between 0 and 1, got {max_skipped!r}")
        self.list_path, self.expected, self.max_skipped = Path(list_path), expected, max_skipped
        self.count = 0
        self._listed: set[str] = set()

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass the batches on without their "skipped" field, and without those that are empty.

        Raises:
            UserError: more than `max_skipped` of the expected samples are lost.
        """
        for batch in batches:
            self.add(batch.pop("skipped", ()))
            if batch:
                yield batch

    def add(self, skipped: Sequence[Skipped]) -> None:
        """Count and list these; raises UserError as `watch`."""
        self.count += len(skipped)
        new = {_on_a_line(item.path): _on_a_line(item.reason) for item in skipped}
        new = {path: reason for path, reason in new.items() if path not in self._listed}
        if new and self.list_path.is_file():  # another account of this run has listed some
            self._listed |= {line.partition("\t")[0] for line in self.list_path.read_text("utf-8").split("\n")}
            new = {path: reason for path, reason in new.items() if path not in self._listed}
        if new:
            self._listed |= new.keys()
            append(self.list_path, "".join(f"{path}\t{reason}\n" for path, reason in new.items()))
            log.warning("%d images could not be read and were skipped, see %s", len(self._listed), self.list_path)
        if self.count > self.max_skipped * self.expected:
            raise UserError(
                f"{self.list_path}: {self.count} of {self.expected} samples were skipped because their images cannot be"
                f" read, more than max_skipped = {self.max_skipped:g}: get these images again, or raise --max_skipped"
            )


def _on_a_line(text: str) -> str:
    """Escaped where it holds control characters, or bytes of a file name that is not UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
