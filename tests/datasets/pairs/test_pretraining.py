import logging

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch.utils.data import DataLoader

from datasets.annotations import Records
from datasets.collate import Skipped, SkippedImages, collate
from datasets.pairs.pretraining import ImageTextDataset
from datasets.sampler import ResumableSampler
from datasets.transforms import EvalTransform, TrainTransform, to_tensor

CAPTIONS = ["a dog left of a cat", "two red apples", "a house"]


@pytest.fixture
def folder(tmp_path, write_image, write_json):
    """Images of four sources with both kinds of path, one of them truncated, and their annotation files."""
    for i in range(6):
        write_image(tmp_path / "images" / "coco" / "val" / f"{i}.png", seed=i)
    broken = tmp_path / "images" / "coco" / "val" / "5.png"
    broken.write_bytes(broken.read_bytes()[:200])
    write_json(
        tmp_path / "relative.json",
        [
            {"image": f"val/{i}.png", "caption": CAPTIONS if i % 2 else CAPTIONS[i // 2], "dataset": "coco"}
            for i in range(6)
        ],
    )
    write_json(
        tmp_path / "prefixed.json",
        [{"image": f"images/coco/val/{i}.png", "caption": CAPTIONS[:2], "bb": [[0, 0, 20, 10], [20, 10, 20, 20]]}
         for i in range(3)],
    )  # fmt: skip
    return tmp_path


def dataset(folder, text, *names, transform=None, seed=0):
    sources = [(folder / name, folder / "images" / "coco") for name in names or ("relative.json", "prefixed.json")]
    return ImageTextDataset(sources, transform or TrainTransform(16), text, seed=seed)


def test_items_hold_the_fields_of_a_batch(folder, text):
    data = dataset(folder, text)
    assert len(data) == 9
    items = [data[n] for n in (0, 1, 6)]
    batch = collate(items)
    length = max(int(item["text_atts"].sum()) for item in items)
    assert batch["image"].shape == (3, 3, 16, 16)
    assert {name: tuple(value.shape) for name, value in batch.items() if name != "image"} == {
        **dict.fromkeys(("text_ids", "text_atts", "text_ids_masked"), (3, length)),
        **dict.fromkeys(("masked_pos", "masked_ids"), (3, 3)),
    }
    for item, ids in zip(items, batch["text_ids"], strict=True):
        assert ids.equal(item["text_ids"][:length]) and not item["text_ids"][length:].any()


def test_both_kinds_of_path_find_the_image(folder, text, write_image, write_json, monkeypatch):
    pixels = write_image(folder / "images" / "coco" / "val" / "0.png", size=(16, 16), seed=0)
    expected = to_tensor(Image.fromarray(pixels))
    monkeypatch.chdir(folder)
    paths = ["val/0.png", "coco/val/0.png", "images/coco/val/0.png", str(folder / "images/coco/val/0.png")]
    write_json(folder / "paths.json", [{"image": path, "caption": "a dog"} for path in paths])
    for root in ("images/coco", folder / "images" / "coco", folder / "images" / ".." / "images" / "coco"):
        data = ImageTextDataset([(folder / "paths.json", root)], EvalTransform(16), text, seed=0)
        assert all(data[n]["image"].equal(expected) for n in range(len(paths)))


def test_a_caption_is_drawn_with_its_box(folder, text, tokenizer):
    data = dataset(folder, text, "prefixed.json", transform=lambda image, rng: to_tensor(image))
    ids = {tuple(text.plain([c])["text_ids"][0].tolist()): box for c, box in zip(CAPTIONS[:2], range(2), strict=True)}
    whole = to_tensor(Image.open(folder / "images" / "coco" / "val" / "0.png"))
    parts = [whole[:, :10, :20], whole[:, 10:30, 20:40]]
    seen = set()
    for epoch in range(20):
        item = data[epoch * len(data)]
        box = ids[tuple(item["text_ids"].tolist())]
        assert item["image"].equal(parts[box])
        seen.add(box)
    assert seen == {0, 1}


def test_one_box_serves_all_captions(folder, text, write_json):
    write_json(folder / "one.json", [{"image": "val/0.png", "caption": CAPTIONS, "bb": [-5, 10, 20, 500]}])
    data = dataset(folder, text, "one.json", transform=lambda image, rng: to_tensor(image))
    assert {tuple(data[n]["image"].shape) for n in range(10)} == {(3, 20, 15)}


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder, text):
    data = dataset(folder, text)
    numbers = [0, 12, 1, 9, 3, 7]
    forward = [data[n] for n in numbers]
    backward = [dataset(folder, text)[n] for n in reversed(numbers)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all(a[name].equal(b[name]) for name in a)
    assert not data[1]["image"].equal(data[10]["image"])  # another epoch
    assert not data[1]["image"].equal(dataset(folder, text, seed=1)[1]["image"])


def test_workers_change_nothing(folder, text, tmp_path):
    def read(workers):
        data = dataset(folder, text)
        sampler = ResumableSampler(len(data), seed=3, batch_size=3, stop=6)
        loader = DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=collate)
        skipped = SkippedImages(tmp_path / f"{workers}" / "skipped.txt", expected=18, max_skipped=1.0)
        return list(skipped.watch(loader)), skipped.count, skipped.list_path.read_text()

    (plain, count, listed), (parallel, parallel_count, parallel_listed) = read(0), read(2)
    assert count == parallel_count == 2 and listed == parallel_listed
    assert len(plain) == len(parallel)
    for a, b in zip(plain, parallel, strict=True):
        assert b["image"].grey.dtype == torch.uint8, "a quarter of the bytes go through shared memory"
        b = move_data_to_device(b, torch.device("cpu"))  # what fabric.to_device does
        assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_a_broken_image_makes_the_batch_smaller_and_is_listed(folder, text, tmp_path, caplog):
    data = dataset(folder, text)
    broken = data[5]
    assert isinstance(broken, Skipped) and broken.path.endswith("val/5.png") and broken.reason
    batch = collate([data[4], broken, data[3]])
    assert batch["image"].shape[0] == batch["text_ids"].shape[0] == 2 and batch["skipped"] == [broken]
    assert collate([broken]) == {"skipped": [broken]}
    assert "skipped" not in collate([data[4]])

    skipped = SkippedImages(tmp_path / "run" / "skipped.txt", expected=300)
    with caplog.at_level(logging.WARNING):
        batches = list(skipped.watch([batch, collate([broken]), collate([data[1]])]))
    assert [len(b["image"]) for b in batches] == [2, 1] and all("skipped" not in b for b in batches)
    assert skipped.count == 2
    assert (tmp_path / "run" / "skipped.txt").read_text().splitlines() == [f"{broken.path}\t{broken.reason}"]
    assert "1 images could not be read" in caplog.text
    skipped.add([broken])
    with pytest.raises(ValueError, match=r"skipped.txt: 4 of 300 .* max_skipped = 0.01.*--max_skipped"):
        skipped.add([broken])


def test_a_line_of_the_list_is_an_image_whatever_its_name(tmp_path):
    names = ["a\nb.png", "a\tb.png", "a\udcffb.png", "\u00e9.png", "plain.png"]
    for _ in range(2):  # accounts of one run: an image is listed once
        account = SkippedImages(tmp_path / "skipped.txt", expected=99, max_skipped=1)
        account.add([Skipped(name, "it is\nbroken") for name in names])
    lines = (tmp_path / "skipped.txt").read_text("utf-8").split("\n")
    told = [r"a\nb.png", r"a\tb.png", r"a\udcffb.png", "\u00e9.png", "plain.png"]
    assert lines == [*(f"{name}\tit is\\nbroken" for name in told), ""]


def test_no_list_is_written_without_a_skipped_image(tmp_path):
    skipped = SkippedImages(tmp_path / "skipped.txt", expected=1, max_skipped=0)
    assert list(skipped.watch([{"image": torch.zeros(1)}])) and not skipped.list_path.exists()
    with pytest.raises(ValueError, match="max_skipped must be a fraction"):
        SkippedImages(tmp_path / "skipped.txt", expected=1, max_skipped=2)


def test_a_missing_image_or_a_box_outside_is_skipped(folder, text, write_json):
    records = [
        {"image": "val/0.png", "caption": "a", "bb": [100, 0, 10, 10]},
        {"image": "val/77.png", "caption": "a"},
    ]
    write_json(folder / "few.json", records)
    outside, missing = (dataset(folder, text, "few.json")[n] for n in range(2))
    assert "outside the image" in outside.reason
    assert missing.path == str(folder / "images" / "coco" / "val" / "77.png") and "FileNotFound" in missing.reason


GOOD = {"image": "val/0.png", "caption": "a dog"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", r"not a JSON file"),
        ({"images": []}, r"expected a JSON list .* got dict"),
        ([], r"no record in this file"),
        ([GOOD, "val/0.png"], r"record 1 is 'val/0.png'; expected"),
        ([GOOD, {"image": "val/0.png", "captoin": "a"}], r"record 1: no key 'caption' \(it has 'image', 'captoin'\)"),
        ([{"caption": "a"}], r"record 0: no key 'image'"),
        ([{"i" * 5000: "a"}], r"record 0: no key 'caption' \(it has 'i{1,30}\.\.\.i{1,30}'\)"),
        ([{**GOOD, "caption": []}], r"record 0: 'caption' must be a text or a list of at least one text, got \[\]"),
        ([{**GOOD, "caption": ["a", 3]}], r"record 0: 'caption' must be a text or a list"),
        ([{**GOOD, "caption": 3}], r"record 0: 'caption' must be a text, got 3"),
        (
            [{**GOOD, "bb": [1, 2, 3]}],
            r"record 0: a box 'bb' must be \[x, y, width, height\] in pixels, got \[1, 2, 3\]",
        ),
        ([{**GOOD, "bb": [[1, 2, 3, 4]] * 2}], r"'bb' must hold one box or one per caption, got 2 for 1 captions"),
        ([{**GOOD, "bb": 7}], r"record 0: .*got 7"),
        ([{**GOOD, "bb": [0, 0, float("nan"), 5]}], r"record 0: a box 'bb' must be .*got \[0, 0, nan, 5\]"),
    ],
)
def test_a_bad_annotation_file_is_one_line_at_startup(folder, text, write_json, content, message):
    write_json(folder / "bad.json", content)
    with pytest.raises(ValueError, match=message) as error:
        dataset(folder, text, "relative.json", "bad.json")
    line = str(error.value)
    assert line.startswith(str(folder / "bad.json")) and "\n" not in line and '"caption"' in line


def test_missing_files_are_one_line_at_startup(folder, text, write_json):
    with pytest.raises(FileNotFoundError, match=r"none.json: annotation file not found; expected .*docs/datasets"):
        dataset(folder, text, "none.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere: image folder not found; docs/datasets"):
        ImageTextDataset([(folder / "relative.json", folder / "nowhere")], TrainTransform(16), text, seed=0)
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: none of 6 images of .*relative.json .* example val/0.png"):
        ImageTextDataset([(folder / "relative.json", folder / "empty")], TrainTransform(16), text, seed=0)
    with pytest.raises(ValueError, match="at least one pair"):
        ImageTextDataset([], TrainTransform(16), text, seed=0)


def test_records_are_what_was_put_in():
    items = [("a", [1.5, 2]), (), "text", {"key": None}]
    records = Records(items)
    assert [records[i] for i in range(len(records))] == items
    for i in (-1, 4):
        with pytest.raises(IndexError):
            records[i]
    assert len(Records([])) == 0


def test_grey_and_transparent_images_are_read_as_rgb(folder, text, write_json):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "images" / "coco" / "grey.jpg")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "images" / "coco" / "alpha.png")
    write_json(folder / "modes.json", [{"image": name, "caption": "a"} for name in ("grey.jpg", "alpha.png")])
    data = dataset(folder, text, "modes.json")
    assert {tuple(data[n]["image"].shape) for n in range(2)} == {(3, 16, 16)}
