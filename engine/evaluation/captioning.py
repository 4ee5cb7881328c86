"""Captions of images by a model, and how close they come to what people wrote."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages, collate
from datasets.tasks.captioning import Described
from engine.evaluation.watched import watched
from engine.ranks import on_leader, summed
from sparsity.files import write_atomic

Score = Callable[[Mapping[int, str], Mapping[int, Sequence[str]]], dict[str, float]]


class Captions:
    """Metrics of a model's captions of `images`, as the model is when this is called; the ranks share the images.

    model: has `generate(image, **generation)`, which gives ids (B, T), see models/parts/captioning.py. decode: ids to
    text, without the prompt. score: captions and references by image id -> metrics. path: where the captions are
    written, in COCO's format of results. batch_size: images at a time. generation: options of the search, of which
    `max_length` must be one. gather: items of `images` to a batch, what `generate` takes under "image". Images that
    cannot be read are listed in `folder`, and their caption is "", which counts
    as any wrong one; more than `max_skipped` of them is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Described,
        decode: Callable[[Iterable[int]], str],
        fabric: Any,
        folder: Path,
        *,
        score: Score,
        batch_size: int,
        generation: Mapping[str, int],
        path: Path | None = None,
        workers: int = 0,
        max_skipped: float = 0.01,
        gather: Callable[[list[Any]], dict[str, Any]] = collate,
    ):
        self.model, self.images, self.decode, self.fabric = model, images, decode, fabric
        self.score, self.path, self.generation = score, path, generation
        starts = range(0, len(images), batch_size)[fabric.global_rank :: fabric.world_size]
        # Whole batches to each rank, so that a caption does not depend on how many ranks there are.
        own = [range(first, min(first + batch_size, len(images))) for first in starts]
        self.batches = DataLoader(images, batch_sampler=own, num_workers=workers, collate_fn=gather)
        expected = max(1, sum(map(len, own)))
        self.skipped = SkippedImages(skipped_path(folder, fabric.global_rank), expected, max_skipped)

    def __call__(self) -> dict[str, float]:
        captions = self.describe()
        return self.fabric.broadcast(on_leader(self.fabric, partial(self._metrics, captions)))

    def describe(self) -> dict[int, str]:
        """Caption of each image id, the same on all ranks; written where there is a path."""
        ids = self.generate().tolist()
        rows = zip(self.images.ids, ids, strict=True)
        captions = {image: self.decode(row) if any(row) else "" for image, row in rows}
        if self.path:
            content = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
            on_leader(self.fabric, partial(write_atomic, self.path, json.dumps(content).encode()))
        return captions

    def _metrics(self, captions: Mapping[int, str]) -> dict[str, float]:
        return self.score(captions, dict(zip(self.images.ids, self.images.references, strict=True)))

    @torch.no_grad()
    def generate(self) -> Tensor:
        """Ids (images, `max_length`) of the captions, the prompt first; zeros after them, and for an image that cannot
        be read.
        """
        ids = torch.zeros(len(self.images), self.generation["max_length"], dtype=torch.long)
        for batch in watched(self.batches, self.skipped, self.fabric, "captions"):
            found = self.model.generate(self.fabric.to_device(batch["image"]), **self.generation).cpu()
            ids[batch["index"], : found.shape[1]] = found
        return summed(self.fabric, ids)


def without_prompt(text: str, prompt: str) -> str:
    """A caption without what every caption begins with."""
    return text.removeprefix(prompt.strip()).strip()
