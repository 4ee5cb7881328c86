"""Frechet distance of what a model draws from images, by the features of a classifier (arXiv 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from datasets.collate import collate
from datasets.transforms import IMAGENET
from engine.generation.sampling import READ, draw
from engine.ranks import summed
from sparsity.errors import UserError

METRICS = {"Frechet": "frechet", "as asked %": "as_asked"}  # column of a table -> metric


@dataclass(frozen=True)
class Moments:
    """Sums over features (n, d), in float64, on the CPU: they add up over parts of the data."""

    count: float
    total: Tensor  # (d,)
    products: Tensor  # (d, d)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        features = features.detach().cpu().double()
        return cls(float(len(features)), features.sum(0), features.t() @ features)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (d, d)."""
        centred = self.products - torch.outer(self.total, self.mean)
        return (centred + centred.t()) / (2 * (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of normal distributions with these moments. UserError for
    fewer than two samples.
    """
    if min(a.count, b.count) < 2:
        raise UserError("the Frechet distance needs at least two samples on each side")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    common = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * common
    return max(0.0, float(apart))


class FrechetDistance:
    """The Frechet distance of the samples of a model, as it is when this is called, from images: {"frechet",
    "as_asked"}; the latter is the share of samples, in per cent, that the judge puts in the class that was asked for.
    The ranks share the samples.

    model: has `sample`, as engine.generation.sampling says. judge: has `features`, `classifier` and
    `config.image_size`, and the same classes. data: the images, items {"image": (3, H, W) in [-1, 1], "label"}; samples
    are of the classes that an even sample of it has. options: of the model's `sample`.
    """

    def __init__(
        self,
        model: nn.Module,
        judge: nn.Module,
        data: Dataset,
        samples: int,
        fabric: Any,
        seed: int = 0,
        **options: Any,
    ):
        self.model, self.judge, self.data, self.fabric = model, judge.eval(), data, fabric
        self.labels = [int(data[i * len(data) // samples]["label"]) for i in range(samples)]
        self.options = {"seed": seed, **options}
        self._reference: Moments | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        if self._reference is None:
            features = [self._judged(batch["image"])[0] for batch in DataLoader(self.data, READ, collate_fn=collate)]
            self._reference = Moments.of(torch.cat(features))
        rank, ranks = self.fabric.global_rank, self.fabric.world_size
        first, stop = (len(self.labels) * part // ranks for part in (rank, rank + 1))
        own = self.labels[first:stop]
        images = draw(self.model, own, self.fabric, first=first, **self.options)
        judged = [self._judged(part) for part in images.split(READ)]
        moments = self._summed(Moments.of(torch.cat([features for features, _ in judged])))
        right = sum((torch.cat([chosen for _, chosen in judged]) == torch.tensor(own)).tolist())
        right = float(summed(self.fabric, torch.tensor(float(right), dtype=torch.float64)))
        return {
            "frechet": frechet_distance(self._reference, moments),
            "as_asked": 100 * right / len(self.labels),
        }

    def _judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, d) and chosen classes (B,), on the CPU."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        side = self.judge.config.image_size
        pixels = F.interpolate((images.clamp(-1, 1) + 1) / 2, (side, side), mode="bicubic", antialias=True)
        features = self.judge.features(((pixels.clamp(0, 1) - mean) / deviation).to(self.fabric.device))
        return features.cpu(), self.judge.classifier(features).argmax(1).cpu()

    def _summed(self, own: Moments) -> Moments:
        count = summed(self.fabric, torch.tensor(own.count, dtype=torch.float64))
        return Moments(float(count), summed(self.fabric, own.total), summed(self.fabric, own.products))
