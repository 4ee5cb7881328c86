"""Texts that a model writes about images: the ids of all texts, shared by the ranks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.collate import collate
from engine.evaluation.watched import own_batches, watched
from engine.ranks import summed


class Written:
    """Texts about `items`, by a model as it is when they are asked for; the ranks share the items.

    model: has `generate(image, **generation)`, which gives ids (B, T), see models/parts/captioning.py. decode: ids to
    text. batch_size: images at a time. generation: options of the search, of which `max_length` must be one. gather:
    items to a batch, what `generate` takes under "image". Images that cannot be read are listed in `folder`, and their
    text is "", which counts as any wrong one; more than `max_skipped` of them is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Dataset,
        decode: Callable[[list[int]], str],
        fabric: Any,
        folder: Path,
        *,
        batch_size: int,
        generation: Mapping[str, int],
        workers: int = 0,
        max_skipped: float = 0.01,
        gather: Callable[[list[Any]], dict[str, Any]] = collate,
    ):
        self.model, self.count, self.decode, self.fabric = model, len(items), decode, fabric
        self.generation = generation
        reading = {"workers": workers, "max_skipped": max_skipped}
        self.batches, self.skipped, _ = own_batches(items, self.count, batch_size, gather, fabric, folder, **reading)

    def texts(self) -> list[str]:
        """Return the text about each item, the same on all ranks."""
        return [self.decode(row) if any(row) else "" for row in self.generate().tolist()]

    @torch.no_grad()
    def generate(self) -> Tensor:
        """Ids (items, `max_length`) of the texts, the prompt first; zeros after them, and for an image that cannot be
        read.
        """
        ids = torch.zeros(self.count, self.generation["max_length"], dtype=torch.long)
        for batch in watched(self.batches, self.skipped, self.fabric, "texts"):
            found = self.model.generate(self.fabric.to_device(batch["image"]), **self.generation).cpu()
            ids[batch["index"], : found.shape[1]] = found
        return summed(self.fabric, ids)
