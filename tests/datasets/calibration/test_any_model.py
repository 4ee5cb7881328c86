"""Calibration batches of any model: folders of images with captions and classes, and functions of the user's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.pruning import ExternalPruneConfig
from datasets.calibration.any_model import FolderBatches, LoaderBatches
from datasets.calibration.own_data import split
from datasets.labelled.image_folder import ImageFolder
from datasets.place import ALONE, Place


def write(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


@pytest.fixture
def photos(tmp_path):
    """Ten images, told apart by how red they are."""
    for i in range(10):
        write(tmp_path / "photos" / f"{i}.png", shade=i)
    return tmp_path / "photos"


class Shades:
    """A preprocessing: (how red each image is, captions, labels)."""

    def check(self, captioned):
        pass

    def labels(self, names):
        return [10 * i for i in range(len(names))]

    def __call__(self, images, captions, labels):
        return [int(np.asarray(image)[0, 0, 0]) for image in images], captions, labels


def batches(folder, tmp_path, num_batches=99, seed=0, place=ALONE, **options):
    config = ExternalPruneConfig(calibration=str(folder), **{"batch_size": 3, **options})
    return FolderBatches(config, Shades(), tmp_path / "out", num_batches, seed, place)


def shades(read):
    return [shades for shades, _, _ in read]


def test_a_folder_without_captions_and_classes(photos, tmp_path):
    read = batches(photos, tmp_path)
    assert len(read) == 4 and read.rounds == [1] * 4 and read.numbers == [0, 1, 2, 3]
    found = list(read)
    assert all(captions is None and labels is None for _, captions, labels in found)
    assert [len(batch) for batch in shades(found)] == [3, 3, 3, 1], "the last partial batch counts"
    assert sorted(sum(shades(found), [])) == list(range(10)) and not (tmp_path / "out").exists()
    assert read.told.endswith(
        "photos: 10 images (0.png, 1.png, 2.png and 7 more), without captions; 4 batches of at most 3 an epoch"
    )
    assert shades(batches(photos, tmp_path)) == shades(found) != shades(batches(photos, tmp_path, seed=1))


def test_epochs_go_on_where_the_last_one_ended(photos, tmp_path):
    read = batches(photos, tmp_path, num_batches=2)
    assert [read.at(epoch).numbers for epoch in (0, 1, 2)] == [[0, 1], [2, 3], [4, 5]]
    stream = sum((shades(read.at(epoch)) for epoch in range(5)), [])
    for turn in (stream[:4], stream[4:8]):
        assert sorted(sum(turn, [])) == list(range(10)), "each image once before any is seen again"
    assert stream[:4] != stream[4:8]
    assert shades(read.at(3)) == stream[6:8], "whatever was read before"


def test_items_that_are_held_out_are_not_calibrated_on(photos, tmp_path):
    calibration, held = split(10)
    assert len(held) == 1 and sorted(calibration + held) == list(range(10))
    config = ExternalPruneConfig(calibration=str(photos), batch_size=4)
    for seed in (0, 1):
        read = FolderBatches(config, Shades(), tmp_path, 99, seed, choose=lambda count: split(count).calibration)
        assert sorted(sum(shades(read), [])) == calibration, "whatever the seed of the run"
        assert "from 9 of the 10" in read.told
    assert split(1) == ([0], [0]) and len(split(100_000).held) == 256
    one = made(lambda: list(range(10)), choose=lambda count: split(count).held)
    others = made(lambda: list(range(10)), choose=lambda count: split(count).calibration)
    assert list(one) == held and list(others) == calibration


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_share_the_batches_of_one(photos, tmp_path, epoch, workers):
    alone = batches(photos, tmp_path).at(epoch)
    found = dict(zip(alone.numbers, shades(alone), strict=True))
    ranks = [batches(photos, tmp_path, place=Place(rank, 2), workers=workers).at(epoch) for rank in range(2)]
    shared = {}
    for rank in ranks:
        assert len(rank) == len(rank.numbers) == sum(rank.rounds)
        shared |= dict(zip(rank.numbers, shades(rank), strict=True))
    assert shared == found
    assert [sum(counts) for counts in zip(*(rank.rounds for rank in ranks), strict=True)] == [1] * 4


def test_more_ranks_than_batches(photos, tmp_path):
    read = batches(photos, tmp_path, num_batches=1, place=Place(1, 2))
    assert list(read) == [] and read.rounds == [0] and len(read) == 0


def test_fewer_images_than_a_batch_are_one(photos, tmp_path):
    assert [len(batch) for batch in shades(batches(photos, tmp_path, batch_size=64))] == [10]


def test_captions_beside_the_images(photos, tmp_path):
    for i in range(10):
        (photos / f"{i}.txt").write_text(f"caption {i}\n\n  other {i} \n")
    found = list(batches(photos, tmp_path))
    drawn = [caption.split() for _, captions, _ in found for caption in captions]
    assert [int(i) for _, i in drawn] == sum(shades(found), [])
    assert {word for word, _ in drawn} == {"caption", "other"}
    assert found == list(batches(photos, tmp_path)), "what is drawn depends on the seed"
    (photos / "7.txt").unlink()
    with pytest.raises(ValueError, match=r"photos: 1 of 10 images have no caption, for example 7\.png"):
        ImageFolder(photos, seed=0)


def test_captions_of_a_list(photos, tmp_path):
    records = [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(10)]
    for content in ({f"{i}.png": [f"caption {i}"] for i in range(10)}, records):
        (photos / "captions.json").write_text(json.dumps(content))
        found = list(batches(photos, tmp_path))
        assert [captions for _, captions, _ in found] == [[f"caption {i}" for i in batch] for batch in shades(found)]
    for content, told in (
        ("1", "it holds 1"),
        ("[1]", "it holds 1"),
        ('[{"image": "0.png"}]', "no key 'caption'"),
        ("[]", "10 of 10 images have no caption"),
        ("{", "captions.json: expected JSON"),
        ('{"0.png": 1}', "'0.png' must be a text"),
        ('{"0.png": "a"}', "9 of 10 images have no caption"),
        ("{}", "10 of 10 images have no caption"),
    ):
        (photos / "captions.json").write_text(content)
        with pytest.raises(ValueError, match=told):
            ImageFolder(photos, seed=0)


def test_folders_are_classes_where_every_image_lies_in_one(photos, tmp_path):
    for i in range(4):
        write(tmp_path / "classes" / "cat" / f"{i}.png", shade=i)
        write(tmp_path / "classes" / "dog" / "young" / f"{i}.png", shade=10 + i)
    data = ImageFolder(tmp_path / "classes", seed=0)
    assert data.classes == ("cat", "dog") and len(data) == 8
    for batch, _, labels in batches(tmp_path / "classes", tmp_path):
        assert labels == [shade // 10 * 10 for shade in batch]
    write(tmp_path / "classes" / "loose.png")
    assert ImageFolder(tmp_path / "classes", seed=0).classes == ()


def test_images_that_cannot_be_read_are_listed(photos, tmp_path):
    (photos / "3.png").write_bytes(b"no image")
    found = list(batches(photos, tmp_path, batch_size=2, max_skipped=0.2))
    assert sum(map(len, shades(found))) == 9
    assert str(photos / "3.png") in (tmp_path / "out" / "skipped.txt").read_text()
    with pytest.raises(ValueError, match="1 of 10 samples were skipped"):
        list(batches(photos, tmp_path, batch_size=2))


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: image folder not found"):
        ImageFolder(tmp_path / "absent", seed=0)
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="no image in this folder"):
        ImageFolder(tmp_path, seed=0)


# Functions of the user's


def numbers(seed, epoch):
    return [torch.tensor([seed, epoch, i]) for i in range(5)]


def made(make, num_batches=99, place=ALONE, choose=None):
    return LoaderBatches(make, "my:loader", num_batches, 7, place, choose)


def test_a_function_is_called_for_each_epoch():
    read = made(numbers)
    assert len(read) == 5 and read.rounds == [1] * 5
    assert [batch.tolist() for batch in read.at(3)] == [[7, 3, i] for i in range(5)]
    assert read.at(3).numbers == [15, 16, 17, 18, 19]
    assert [int(batch[2]) for batch in made(numbers, num_batches=2)] == [0, 1]
    assert len(list(made(lambda: [1, 2, 3]))) == 3, "it need not ask for anything"


@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_share_the_batches_of_a_function(epoch):
    ranks = [made(numbers, place=Place(rank, 2)).at(epoch) for rank in range(2)]
    found = {n: batch.tolist() for rank in ranks for n, batch in zip(rank.numbers, rank, strict=True)}
    assert found == {5 * epoch + i: [7, epoch, i] for i in range(5)}


def test_a_stream_must_be_as_long_as_was_asked_for():
    def stream():
        yield from range(3)

    assert list(made(stream, num_batches=3)) == [0, 1, 2] == list(made(stream, num_batches=2)) + [2]
    with pytest.raises(ValueError, match="my:loader: ended after 3 of 99 batches: give --num_batches 3"):
        list(made(stream))


def test_what_a_function_must_not_return():
    with pytest.raises(ValueError, match="--calibration my:loader: expected an iterable of batches, got int"):
        made(lambda: 3)
    with pytest.raises(ValueError, match="there is no batch"):
        made(lambda: [])
