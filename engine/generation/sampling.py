"""Samples of a model that removes noise: drawn batch by batch, laid out as one picture, validated while it trains.

A model has `sample` as `models.dit.model.DiT` has it; images are (B, 3, H, W) in [-1, 1].
"""

import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.collate import collate
from engine.ranks import on_leader
from sparsity.files import write_atomic

READ = 128  # samples that go through a model together
GAP = 2  # white pixels between the images of a grid


def draw(
    model: nn.Module, labels: Sequence[int], fabric: Any, *, first: int = 0, batch: int = READ, **options: Any
) -> Tensor:
    """A sample for each label, (len(labels), C, H, W) on the CPU, with a progress bar; the model is in eval() then.

    first: number of the first sample. options: of the model's `sample`. What is drawn does not depend on `batch`.
    """
    was_training = model.training
    model.eval()
    drawn = []
    total = math.ceil(len(labels) / batch) * options["steps"]
    try:
        with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=not fabric.is_global_zero) as bar:
            for start in range(0, len(labels), batch):
                own = labels[start : start + batch]
                with fabric.autocast():
                    drawn.append(
                        model.sample(own, first=first + start, progress=partial(_counted, bar), **options).cpu()
                    )
    finally:
        model.train(was_training)
    return torch.cat(drawn)


def _counted(bar: tqdm, steps: Iterable[int]) -> Iterable[int]:
    for step in steps:
        yield step
        bar.update()


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Images side by side in rows, by default in a square: (H, W, 3) uint8."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = (side + GAP for side in images.shape[2:])
    canvas = np.full((rows * height + GAP, columns * width + GAP, 3), 255, np.uint8)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        y, x = i // columns * height + GAP, i % columns * width + GAP
        canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    return canvas


def save_grid(path: str | Path, images: Tensor, columns: int | None = None) -> None:
    """Write `grid` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    Image.fromarray(grid(images, columns)).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


class Denoised:
    """The mean loss over `data`, batches of clean samples with noise, and a picture of samples, samples_<n>.png in
    `folder`, n = 1, 2, ... as this is called; each rank reads all.

    labels: of the samples in the picture. steps: in which they are drawn.
    """

    def __init__(self, model: nn.Module, data: Dataset, labels: Sequence[int], steps: int, fabric: Any, folder: Path):
        self.model, self.labels, self.steps, self.fabric, self.folder = model, labels, steps, fabric, folder
        self.batches = DataLoader(data, READ, collate_fn=collate)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        was_training, total, count = self.model.training, 0.0, 0
        self.model.eval()
        try:
            for batch in self.batches:
                with self.fabric.autocast():
                    loss = self.model.losses(self.fabric.to_device(batch))["loss"]
                total, count = total + float(loss) * len(batch["label"]), count + len(batch["label"])
        finally:
            self.model.train(was_training)
        on_leader(self.fabric, self._picture())
        return {"loss": total / count}

    def _picture(self) -> Callable[[], None]:
        number = 1 + len(list(self.folder.glob("samples_*.png")))
        images = draw(self.model, self.labels, self.fabric, steps=self.steps)
        return partial(save_grid, self.folder / f"samples_{number}.png", images)
