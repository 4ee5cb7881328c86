"""Accuracy against torchmetrics; images that cannot be read, ranks, ties."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import multiclass_accuracy

from datasets.collate import Skipped
from engine.evaluation.classification import Accuracy, top_k

CLASSES = 9


class Images(Dataset):
    """Random images with labels; `broken` ones cannot be read."""

    def __init__(self, n, broken=()):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(n, 3, 2, 2, generator=generator)
        self.labels = torch.randint(CLASSES, (n,), generator=generator)
        self.broken = broken

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i in self.broken:
            return Skipped(f"{i}.png", "broken")
        return {"image": self.images[i], "label": self.labels[i]}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.drop = nn.Linear(12, CLASSES), nn.Dropout(0.9)

    def classify(self, image):
        return self.drop(self.layer(image.flatten(1)))


class Ranks:
    """Fabric of several processes, one after another: sums what the ranks give."""

    device = torch.device("cpu")
    is_global_zero = False

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size, self.given = rank, world_size, []

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def all_reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        self.given.append(tensor)
        return tensor


def accuracy(data, folder, rank=0, world_size=1, **options):
    return Accuracy(Linear().train(), data, Ranks(rank, world_size), folder, **options)


def expected(data, k):
    with torch.no_grad():
        logits = Linear().eval().classify(data.images)
    return 100 * multiclass_accuracy(logits, data.labels, CLASSES, "micro", top_k=k).item()


def test_it_is_the_accuracy_in_per_cent(tmp_path):
    data = Images(301)
    measure = accuracy(data, tmp_path)
    result = measure()
    assert result == pytest.approx({"top1": expected(data, 1), "top5": expected(data, 5)}, abs=1e-4)
    assert measure() == result, "nothing is left over from the first time"
    assert measure.model.training, "the model is as it was"


@pytest.mark.parametrize(("n", "world_size"), [(301, 2), (301, 3), (2, 3)])
def test_ranks_share_the_images_and_count_none_twice(tmp_path, n, world_size):
    data, right = Images(n), torch.zeros(2, dtype=torch.float64)
    for rank in range(world_size):
        measure = accuracy(data, tmp_path, rank, world_size)
        measure()
        right += measure.fabric.given[0]
    whole = accuracy(data, tmp_path)()
    assert (100 * right / n).tolist() == pytest.approx([whole["top1"], whole["top5"]])


def test_an_image_that_cannot_be_read_is_wrong(tmp_path):
    whole, broken = Images(200), Images(200, broken=set(range(130, 150)) | {3})
    readable = Images(200)
    readable.labels[[3, *range(130, 150)]] = -1
    measure = accuracy(broken, tmp_path, max_skipped=0.2)
    with torch.no_grad():
        best = Linear().eval().classify(whole.images).argmax(1)
    assert measure()["top1"] == pytest.approx(100 * (best == readable.labels).float().mean().item(), abs=1e-4)
    assert measure()["top1"] == measure()["top1"]
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 21


def test_a_batch_without_a_readable_image(tmp_path):
    assert accuracy(Images(3, broken={0, 1, 2}), tmp_path, max_skipped=1.0)() == {"top1": 0.0, "top5": 0.0}


def test_too_many_unreadable_images_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="21 of 200"):
        accuracy(Images(200, broken=set(range(21))), tmp_path, max_skipped=0.1)()


def test_a_collapsed_model_has_no_luck():
    labels = torch.arange(6)
    assert not top_k(torch.zeros(6, 6), labels, 5).any(), "all classes tie"
    assert top_k(torch.zeros(6, 6), labels, 6).all()
    assert not top_k(torch.full((6, 6), torch.nan), labels, 5).any()
    one = torch.zeros(6, 6).fill_diagonal_(1.0)
    assert top_k(one, labels, 1).all()
    one[:, 5] = torch.nan
    assert not top_k(one, labels, 1).any(), "a NaN ranks before any number"


def test_fewer_classes_than_five(tmp_path):
    logits, labels = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(10, dtype=torch.long)
    assert top_k(logits, labels, 5).all()
