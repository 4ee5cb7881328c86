"""The Frechet distance against torchmetrics, and of a model that draws the data."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.image.fid import _compute_fid

from datasets.bundled.generation import Latents
from engine.evaluation.frechet import FrechetDistance, Moments, frechet_distance


def features(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + seed


def theirs(a, b):
    a, b = a.double(), b.double()
    return float(_compute_fid(a.mean(0), a.t().cov(), b.mean(0), b.t().cov()))


def test_it_is_the_formula():
    a, b = features(200, 12, 1), features(150, 12, 2)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    assert found == pytest.approx(theirs(a, b), rel=1e-8)
    assert frechet_distance(Moments.of(b), Moments.of(a)) == pytest.approx(found, rel=1e-8)


def test_fewer_samples_than_features():
    a, b = features(5, 12, 1), features(7, 12, 2)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(theirs(a, b), rel=1e-4)
    with pytest.raises(ValueError, match="at least two samples"):
        frechet_distance(Moments.of(a[:1]), Moments.of(b))


def test_the_same_set_is_at_no_distance():
    a = Moments.of(features(50, 12, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_moments_add_up():
    a = features(50, 4, 3)
    parts, whole = Moments.of(a[:20]) + Moments.of(a[20:]), Moments.of(a)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.covariance, whole.covariance)
    np.testing.assert_allclose(whole.covariance.numpy(), np.cov(a.double().numpy(), rowvar=False))


class Judge(nn.Module):
    """Features are mean colours; dark images are of class 0."""

    def __init__(self):
        super().__init__()
        self.config = type("Sizes", (), {"image_size": 8})
        self.classifier = lambda f: torch.stack([-f.sum(1), f.sum(1)], 1)

    def features(self, images):
        return images.mean((2, 3))


class Painter(nn.Module):
    """Draws the images of a data set again; those of one class alone where `mode` says so."""

    def __init__(self, data: Dataset, mode: int | None = None):
        super().__init__()
        self.data, self.mode = data, mode

    def sample(self, labels, *, first, progress, steps, seed, **options):
        list(progress(range(steps)))
        numbers = [i * len(self.data) // 40 for i in range(first, first + len(labels))]
        images = [self.data[n]["image"] if self.mode is None else self.data[self.mode]["image"] for n in numbers]
        return torch.stack(images)


class OneOf:
    """Fabric of one process."""

    global_rank, world_size, device, is_global_zero = 0, 1, torch.device("cpu"), False

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def test_a_model_that_draws_the_data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    shade = (labels.float() * 1.2 - 0.6).view(-1, 1, 1, 1) + 0.1 * torch.randn(40, 3, 1, 1, generator=generator)
    data = Latents(shade.expand(40, 3, 4, 4).clamp(-1, 1).contiguous(), labels)
    perfect = FrechetDistance(Painter(data), Judge(), data, 40, OneOf(), steps=2)()
    assert perfect["frechet"] == pytest.approx(0, abs=1e-6) and perfect["as_asked"] == 100
    collapsed = FrechetDistance(Painter(data, mode=0), Judge(), data, 40, OneOf(), steps=2)()
    assert collapsed["frechet"] > 1 and collapsed["as_asked"] == 50
