"""Accuracy of a classifier on labelled images, and its agreement with the dense model on images without labels."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages, collate
from datasets.labelled.unlabelled import UnlabelledImages
from engine.evaluation.watched import watched
from engine.ranks import summed

READ = 128  # images classified together


def top_k(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Which of the labels (B,) are among the k largest of the logits (B, classes): (B,) bool.

    A class that ties with the label's ranks before it, and so does a NaN: a collapsed model has no luck.
    """
    own = logits.gather(1, labels[:, None])
    before = (~(logits < own)).sum(1) - 1  # the label itself is not below itself
    return (before < k) & ~own.squeeze(1).isnan()


class Accuracy:
    """Top-1 and top-5 accuracy of a model in per cent, as it is when this is called; the ranks share the images.

    model: has `classify`, images (B, 3, H, W) to logits. data: items {"image", "label"}. Images that cannot be read
    are listed in `folder` and count as wrong; more than `max_skipped` of them is an error.
    """

    metrics: ClassVar = {"top1": 1, "top5": 5}  # name -> k: right where the label is among the k first classes

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        fabric: Any,
        folder: Path,
        *,
        workers: int = 0,
        max_skipped: float = 0.01,
        batch_size: int = READ,
    ):
        self.model, self.fabric, self.total = model, fabric, len(data)
        own = Subset(data, range(fabric.global_rank, len(data), fabric.world_size))
        self.batches = DataLoader(own, batch_size, num_workers=workers, collate_fn=collate)
        self.skipped = SkippedImages(skipped_path(folder, fabric.global_rank), max(1, len(own)), max_skipped)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        right = torch.zeros(len(self.metrics), dtype=torch.float64)
        try:
            for batch in watched(self.batches, self.skipped, self.fabric, "images"):
                right += self._right(batch)
        finally:
            self.model.train(was_training)
        counts = summed(self.fabric, right).tolist()
        return {name: 100 * count / self.total for name, count in zip(self.metrics, counts, strict=True)}

    def _right(self, batch: Mapping[str, Any]) -> Tensor:
        """How many images of a batch are right, for each of `metrics`."""
        image = batch["image"].to(self.fabric.device)
        with self.fabric.autocast():
            logits = self.model.classify(image).float().cpu()
        labels = self._labels(batch | {"image": image})
        return torch.stack([top_k(logits, labels, k).sum() for k in self.metrics.values()])

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["label"]


class Agreement(Accuracy):
    """How often a model's first class is that of the dense model, in per cent, on images that need no labels; else as
    `Accuracy`.

    dense: a batch {"image"} -> logits (B, classes).
    """

    metrics: ClassVar = {"agree": 1}

    def __init__(self, model: nn.Module, dense: Callable[[Mapping[str, Any]], Tensor], *args: Any, **options: Any):
        super().__init__(model, *args, **options)
        self.dense = dense

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        with self.fabric.autocast():
            return self.dense(batch).float().argmax(1).cpu()


def measure(tuning: Any, data: Dataset) -> Accuracy:
    """Return what measures a classifier in training (a `Finetuning`) on images: its accuracy, or, where they have no
    labels, how often it agrees with its teacher.
    """
    config, place = tuning.config, (tuning.fabric, tuning.args.output_dir)
    reading = {"workers": config.workers, "max_skipped": config.max_skipped}
    images = data.dataset if isinstance(data, Subset) else data
    if not isinstance(images, UnlabelledImages):
        return Accuracy(tuning.model, data, *place, **reading)

    def dense(batch: Mapping[str, Any]) -> Tensor:
        return tuning.view.outputs(batch, tuning.sparse.teacher)["logits"].tensor

    return Agreement(tuning.model, dense, data, *place, **reading)


class Classifier(nn.Module):
    """A model whose forward gives logits, as `Accuracy` calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training

    def classify(self, image: Tensor) -> Tensor:
        return self.model(image)
