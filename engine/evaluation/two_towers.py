"""Recalls of models that compare images and texts and preprocess both themselves (CLIP, SigLIP)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.own.sets import OwnImages
from datasets.tasks.retrieval import recall
from engine.evaluation.watched import own_batches, watched
from engine.ranks import summed


class Recalls:
    """Recalls of a model in per cent, as it is when this is called; the ranks share the images.

    model: has `encode_images(batch)` and `encode_texts(batch)`, each (B, E), l2-normalised. gather: items of `data` to
    a batch, with their "index". texts: captions to a batch. batch_size: images, or texts, at a time. Images that cannot
    be read are listed in `folder` and count as not found; more than `max_skipped` of them is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        data: OwnImages,
        fabric: Any,
        folder: Path,
        *,
        gather: Callable[[Sequence[Any]], dict[str, Any]],
        texts: Callable[[Sequence[str]], dict[str, Tensor]],
        batch_size: int,
        workers: int = 0,
        max_skipped: float = 0.01,
    ):
        self.model, self.data, self.fabric, self.texts, self.batch_size = model, data, fabric, texts, batch_size
        reading = {"workers": workers, "max_skipped": max_skipped}
        self.images, self.skipped, _ = own_batches(data, len(data), batch_size, gather, fabric, folder, **reading)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        try:
            texts = self._text_features()
            scores = self._image_features(texts.shape[1]) @ texts.t()  # (I, T)
        finally:
            self.model.train(was_training)
        return recall(scores, scores.t(), self.data.txt2img, self.data.img2txt)

    def _text_features(self) -> Tensor:
        """Features (T, E) of all captions, by each rank: they cost less than the images."""
        found, texts = [], self.data.texts
        for first in range(0, len(texts), self.batch_size):
            batch = self.fabric.to_device(self.texts(texts[first : first + self.batch_size]))
            found.append(self.model.encode_texts(batch).float().cpu())
        return torch.cat(found)

    def _image_features(self, width: int) -> Tensor:
        """Features (I, E) of all images, the same on all ranks; NaN where one cannot be read."""
        features, read = torch.zeros(len(self.data), width), torch.zeros(len(self.data))
        for batch in watched(self.images, self.skipped, self.fabric, "images"):
            index = batch.pop("index")
            features[index] = self.model.encode_images(self.fabric.to_device(batch)).float().cpu()
            read[index] = 1
        features, read = summed(self.fabric, features), summed(self.fabric, read)
        return features.masked_fill((read == 0)[:, None], torch.nan)
