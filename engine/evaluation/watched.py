"""The reading and the loop that evaluations share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages


class OwnBatches(NamedTuple):
    """The batches of a rank. own: numbers of their items, in their order."""

    loader: DataLoader
    skipped: SkippedImages
    own: list[int]


def own_batches(
    items: Dataset,
    count: int,
    batch_size: int,
    gather: Callable[[list[Any]], dict[str, Any]],
    fabric: Any,
    folder: Path,
    *,
    workers: int = 0,
    max_skipped: float = 0.01,
) -> OwnBatches:
    """Return this rank's share of `count` items, whole batches: so no result depends on how many ranks there are.

    Images that cannot be read are listed in `folder`; more than `max_skipped` of them is an error.
    """
    starts = range(0, count, batch_size)[fabric.global_rank :: fabric.world_size]
    batches = [list(range(first, min(first + batch_size, count))) for first in starts]
    own = [number for batch in batches for number in batch]
    loader = DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=gather)
    return OwnBatches(
        loader, SkippedImages(skipped_path(folder, fabric.global_rank), max(1, len(own)), max_skipped), own
    )


def watched(batches: DataLoader, skipped: SkippedImages, fabric: Any, what: str) -> Iterator[dict[str, Any]]:
    """Yield this rank's batches in which an image could be read, and show the progress; what: is evaluated.

    Images that cannot be read count from 0 at each call: they are the same ones. Raises UserError as
    `SkippedImages.watch`.
    """
    skipped.count = 0
    shown = tqdm(batches, desc=what, unit="batch", leave=False, disable=not fabric.is_global_zero)
    yield from skipped.watch(shown)
