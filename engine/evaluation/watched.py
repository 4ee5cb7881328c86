"""The loop that evaluations share."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets.collate import SkippedImages


def watched(batches: DataLoader, skipped: SkippedImages, fabric: Any, what: str) -> Iterator[dict[str, Any]]:
    """Yield this rank's batches in which an image could be read, and show the progress; what: is evaluated.

    Images that cannot be read count from 0 at each call: they are the same ones. Raises UserError as
    `SkippedImages.watch`.
    """
    skipped.count = 0
    shown = tqdm(batches, desc=what, unit="batch", leave=False, disable=not fabric.is_global_zero)
    yield from skipped.watch(shown)
