import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.collate import Skipped, collate_regions
from datasets.pairs.regions import RegionDataset, clip_boxes
from datasets.sampler import ResumableSampler

ELEMS = [
    {"bb": [2, 3, 10, 8], "caption": "a dog", "attributes": ["brown", "small"]},
    {"bb": [20, 10, 15, 15], "caption": ["a cat", "the cat"], "attributes": "white"},
    {"bb": [30, 20, 50, 50], "caption": "a house"},
    {"bb": [5, 5, 0, 4], "caption": "nothing wide"},
]


@pytest.fixture
def folder(tmp_path, write_image, write_json):
    for i in range(4):
        write_image(tmp_path / "images" / "vg" / f"{i}.png", seed=i)
    broken = tmp_path / "images" / "vg" / "3.png"
    broken.write_bytes(b"no image")
    records = [
        {"image": "images/vg/0.png", "caption": ["two animals", "a picture"], "elems": ELEMS},
        {"image": "1.png", "elems": ELEMS[:2]},
        {"image": "2.png", "caption": "only this", "elems": []},
        {"image": "3.png", "elems": ELEMS},
        {"image": "0.png", "elems": ELEMS[3:]},
    ]
    write_json(tmp_path / "vg_regions.json", records)
    return tmp_path


def dataset(folder, text, name="vg_regions.json", **options):
    return RegionDataset([(folder / name, folder / "images" / "vg")], text, 32, 8, **{"seed": 0, **options})


def captions_of(text, item):
    """The texts of the regions, read back from their ids."""
    return [
        text.tokenizer.decode(region["text_ids"][: region["text_atts"].sum()].tolist()) for region in item["regions"]
    ]


def test_regions_of_an_item(folder, text):
    data = dataset(folder, text)
    assert len(data) == 4  # the last record has neither caption nor region
    for epoch in range(10):
        item = data[epoch * len(data)]
        assert item["image"].shape == (3, 32, 32)
        assert [region["is_image"].item() for region in item["regions"]] == [1] + [0] * (len(item["regions"]) - 1)
        assert 2 <= len(item["regions"]) <= 4
        whole = item["regions"][0]
        assert whole["image_atts"].tolist() == [1] * 17 and whole["target_bbox"].tolist() == [0.5, 0.5, 1, 1]
        for region in item["regions"]:
            box = region["target_bbox"]
            assert box.dtype == torch.float32 and (box[2:] > 0).all()
            assert (box[:2] - box[2:] / 2 > -1e-6).all() and (box[:2] + box[2:] / 2 < 1 + 1e-6).all()
            assert region["image_atts"][0] == 1 and region["image_atts"].sum() >= 2


def test_captions_attributes_and_the_whole_image_are_drawn(folder, text):
    data = dataset(folder, text)
    seen = {caption for epoch in range(60) for caption in captions_of(text, data[epoch * len(data)])}
    assert seen == {
        *("two animals", "a picture", "brown a dog", "small a dog", "white a cat", "white the cat", "a house"),
    }
    assert captions_of(text, data[2]) == ["only this"]
    assert data[2]["regions"][0]["is_image"] == 1


@pytest.mark.parametrize("max_regions", [1, 2, 3])
def test_at_most_max_regions(folder, text, max_regions):
    data = dataset(folder, text, max_regions=max_regions)
    counts = [len(data[n]["regions"]) for n in range(0, 40, 4)]
    assert max(counts) <= max_regions and min(counts) >= 1
    assert {len(data[n]["regions"]) for n in range(1, 41, 4)} <= {1, min(2, max_regions)}


def test_captions_that_name_a_side_forbid_flips(folder, text, write_json):
    elem = {"bb": [0, 0, 40, 30], "caption": "a dog"}  # the box of the whole image: nothing is cropped
    records = [
        {"image": "0.png", "elems": [elem, {**elem, "caption": "on the left"}]},
        {"image": "0.png", "elems": [elem]},
    ]
    write_json(folder / "sides.json", records)
    data = dataset(folder, text, "sides.json")
    sided, free = ([data[2 * epoch + i]["image"] for epoch in range(20)] for i in range(2))
    assert all(image.equal(sided[0]) for image in sided)
    flipped = [not image.equal(sided[0]) for image in free]
    assert 0 < sum(flipped) < 20
    assert all(image.equal(sided[0].flip(2)) for image, was in zip(free, flipped, strict=True) if was)


def test_collate_regions(folder, text):
    data = dataset(folder, text)
    items = [data[0], data[1], data[2]]
    batch = collate_regions([items[0], data[3], items[1], items[2]])
    counts = [len(item["regions"]) for item in items]
    total = sum(counts)
    length = max(int(region["text_atts"].sum()) for item in items for region in item["regions"])
    assert isinstance(data[3], Skipped) and batch.pop("skipped") == [data[3]]
    assert batch["image"].shape == (3, 3, 32, 32)
    assert batch["idx_to_group_img"].tolist() == np.repeat([0, 1, 2], counts).tolist()
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "image": (3, 3, 32, 32),
        **dict.fromkeys(("text_ids", "text_atts", "text_ids_masked"), (total, length)),
        **dict.fromkeys(("masked_pos", "masked_ids"), (total, 3)),
        "image_atts": (total, 17),
        "target_bbox": (total, 4),
        "is_image": (total,),
        "idx_to_group_img": (total,),
    }
    floats = {name for name, value in batch.items() if value.dtype == torch.float32}
    assert floats == {"image", "target_bbox"} and all(
        v.dtype == torch.int64 for n, v in batch.items() if n not in floats
    )
    assert batch["image_atts"].equal(torch.stack([r["image_atts"] for item in items for r in item["regions"]]))
    assert collate_regions([data[3]]) == {"skipped": [data[3]]}


def test_workers_change_nothing(folder, text):
    def read(workers):
        data = dataset(folder, text)
        sampler = ResumableSampler(len(data), seed=1, batch_size=2, stop=4)
        return list(DataLoader(data, 2, sampler=sampler, num_workers=workers, collate_fn=collate_regions))

    for a, b in zip(read(0), read(2), strict=True):
        assert a.keys() == b.keys()
        assert all(a[name].equal(b[name].to("cpu")) if name != "skipped" else a[name] == b[name] for name in a)


def test_boxes_are_cut_to_the_image():
    boxes, large = clip_boxes(np.array([[-5, -5, 10, 20], [38, 0, 50, 5], [50, 50, 9, 9]], float), (40, 30), 3.0)
    assert boxes[:2].tolist() == [[0, 0, 5, 15], [38, 0, 2, 5]] and large.tolist() == [True, False, False]


def test_regions_that_all_lie_outside_are_skipped(folder, text, write_json):
    elem = {"bb": [400, 300, 10, 10], "caption": "far away"}
    write_json(
        folder / "far.json", [{"image": "0.png", "elems": [elem]}, {"image": "0.png", "caption": "a", "elems": [elem]}]
    )
    data = dataset(folder, text, "far.json")
    assert "no region lies inside" in data[0].reason
    assert captions_of(text, data[1]) == ["a"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": "0.png"}, r"record 0: 'elems' must be a list of regions, got None"),
        ({"image": "0.png", "elems": [{"caption": "a"}]}, r"record 0: a box 'bb' must be .* got None"),
        ({"image": "0.png", "elems": [{"bb": [1, 2, 3, 4]}]}, r"record 0: no key 'caption' \(it has 'bb'\)"),
        ({"image": "0.png", "elems": [{**ELEMS[0], "attributes": 3}]}, r"record 0: 'attributes' must be a text, got 3"),
        ({"elems": ELEMS}, r"record 0: no key 'image'"),
        ({"image": "0.png", "elems": ELEMS[3:]}, r"no record has a caption or an element of at least 1 pixels"),
    ],
)
def test_a_bad_annotation_file_is_one_line_at_startup(folder, text, write_json, record, message):
    write_json(folder / "bad.json", [record])
    with pytest.raises(ValueError, match=message) as error:
        dataset(folder, text, "bad.json")
    assert str(error.value).startswith(str(folder / "bad.json")) and "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "named"), [({"max_regions": 0}, "max_regions"), ({"image_res": 30}, "image_res")])
def test_bad_arguments_are_named(folder, text, options, named):
    arguments = {"image_res": 32, "patch_size": 8, "seed": 0, **options}
    with pytest.raises(ValueError, match=named):
        RegionDataset([(folder / "vg_regions.json", folder / "images" / "vg")], text, **arguments)
