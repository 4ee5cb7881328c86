"""Captions of images by a model, and how close they come to what people wrote."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from datasets.tasks.captioning import Described
from engine.evaluation.written import Written
from engine.ranks import on_leader
from sparsity.files import write_atomic

Score = Callable[[Mapping[int, str], Mapping[int, Sequence[str]]], dict[str, float]]


class Captions(Written):
    """Metrics of a model's captions of `images`, as the model is when this is called.

    decode: ids to text, without the prompt. score: captions and references by image id -> metrics. path: where the
    captions are written, in COCO's format of results. options: of `Written`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Described,
        decode: Callable[[list[int]], str],
        fabric: Any,
        folder: Path,
        *,
        score: Score,
        path: Path | None = None,
        **options: Any,
    ):
        super().__init__(model, images, decode, fabric, folder, **options)  # pyright: ignore[reportArgumentType]
        self.images, self.score, self.path = images, score, path

    def __call__(self) -> dict[str, float]:
        captions = self.describe()
        return self.fabric.broadcast(on_leader(self.fabric, partial(self._metrics, captions)))

    def describe(self) -> dict[int | str, str]:
        """Caption of each image id, the same on all ranks; written where there is a path."""
        captions = dict(zip(self.images.ids, self.texts(), strict=True))
        if self.path:
            content = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
            on_leader(self.fabric, partial(write_atomic, self.path, json.dumps(content).encode()))
        return captions

    def _metrics(self, captions: Mapping[Any, str]) -> dict[str, float]:
        return self.score(captions, dict(zip(self.images.ids, self.images.references, strict=True)))


def without_prompt(text: str, prompt: str) -> str:
    """A caption without what every caption begins with."""
    return text.removeprefix(prompt.strip()).strip()
