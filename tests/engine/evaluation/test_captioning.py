"""Captions of a set of images: what is written, shared by ranks, and left out."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import Dataset

from datasets.collate import Skipped
from engine.evaluation.captioning import Captions, without_prompt

LENGTH = 8


class Images(Dataset):
    """Image i is the number i; those of `broken` cannot be read."""

    def __init__(self, count, broken=()):
        self.ids, self.references = [100 + i for i in range(count)], [[f"number {i}"] for i in range(count)]
        self.broken = broken

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        if i in self.broken:
            return Skipped(f"{i}.jpg", "damaged")
        return {"image": torch.full((3, 2, 2), float(i)), "index": torch.tensor(i)}


class Writes(nn.Module):
    """Describes image i by 1 + i % 3 times its number, after the prompt 9."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def generate(self, image, max_length, **_):
        numbers = image[:, 0, 0, 0].long()
        self.batches.append(numbers.tolist())
        lengths = 1 + numbers % 3
        ids = torch.zeros(len(image), 1 + int(lengths.max()), dtype=torch.long)
        ids[:, 0] = 9
        for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            ids[row, 1 : 1 + length] = number
        assert ids.shape[1] <= max_length
        return ids


def decode(ids):
    """The number, as often as it stands there."""
    return " ".join(str(i) for i in ids[1:] if i)


def score(captions, references):
    return {"right": 100.0 * sum(text in references[image][0] for image, text in captions.items()) / len(captions)}


def score_of_words(captions, references):
    """As `score`, but nothing said is not right."""
    assert list(captions) == list(references)
    return score({image: text or "nothing" for image, text in captions.items()}, references)


def make(folder, images, fabric=None, **options):
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    options = {"batch_size": 4, "generation": {"max_length": LENGTH}, "score": score} | options
    return Captions(Writes(), images, decode, fabric, folder, **options)


def test_what_is_written(tmp_path):
    captions = make(tmp_path, Images(10), path=tmp_path / "result" / "captions.json")
    assert captions() == {"right": pytest.approx(40.0)}  # 0 is "", which is everywhere; 3, 6, 9 are said once
    content = json.loads((tmp_path / "result" / "captions.json").read_text())
    assert (
        content[4] == {"image_id": 104, "caption": "4 4"}
        and [one["image_id"] for one in content] == captions.images.ids
    )
    assert captions.model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_nothing_is_written_without_a_path(tmp_path):
    make(tmp_path, Images(3))()
    assert not list(tmp_path.iterdir())


def ranked(rank, ranks):
    """Return what a rank sees of its fabric; the reduction is left to the test."""
    options = {"global_rank": rank, "world_size": ranks, "is_global_zero": rank == 0, "device": torch.device("cpu")}
    return SimpleNamespace(**options, to_device=lambda batch: batch, all_reduce=lambda tensor, reduce_op: tensor)


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("count", [1, 9, 12])
def test_ranks_share_whole_batches(tmp_path, ranks, count):
    """Each describes its part and leaves zeros elsewhere; no batch is another one than on one rank alone."""
    alone = make(tmp_path, Images(count))
    whole = alone.generate()
    parts = [make(tmp_path, Images(count), ranked(rank, ranks)) for rank in range(ranks)]
    assert torch.equal(sum(part.generate() for part in parts), whole) and whole[:, 0].eq(9).all()
    batches = [batch for part in parts for batch in part.model.batches]
    assert sorted(batches) == sorted(alone.model.batches)


def test_the_caption_of_an_image_that_cannot_be_read_is_empty(tmp_path):
    images = Images(10, broken=(1, 4, 5, 6, 7))
    captions = make(tmp_path, images, path=tmp_path / "c.json", max_skipped=0.5, score=score_of_words)
    for _ in range(2):  # it may be called again: these are the same images
        assert captions() == {"right": pytest.approx(20.0)}  # 3 and 9
    found = {one["image_id"]: one["caption"] for one in json.loads((tmp_path / "c.json").read_text())}
    assert list(found) == images.ids and [i for i in range(1, 10) if not found[100 + i]] == [1, 4, 5, 6, 7]
    assert (tmp_path / "skipped.txt").read_text().splitlines() == [f"{i}.jpg\tdamaged" for i in images.broken]
    with pytest.raises(ValueError, match=r"2 of 10 samples were skipped|5 of 10 samples were skipped"):
        make(tmp_path, images, max_skipped=0.1)()


def test_the_prompt_is_left_out():
    assert without_prompt("a picture of a red cat", "a picture of ") == "a red cat"
    assert without_prompt("a picture of", "a picture of ") == "" and without_prompt("a cat", "") == "a cat"
