"""A user's own captions: the same pairs whichever way they are written, held out by image, faults by their place."""

import json

import pytest

from datasets.collate import Skipped
from datasets.own.captions import read_captions
from datasets.own.check import check_own
from datasets.own.sets import OwnImages, OwnPairs
from datasets.splits import split
from sparsity.errors import MissingFileError, UserError
from tests.own_data import captioned, captions_of, pictures, png, shard


def written(folder):
    """The same six images with their captions in every way; name -> what --data is given."""
    names = pictures(folder / "list")
    records = [{"image": name, "caption": captions_of(i)} for i, name in enumerate(names)]
    pairs = [{"image": r["image"], "caption": text} for r in records for text in r["caption"]]
    (folder / "list/captions.json").write_text(json.dumps(records))
    (folder / "list/pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n\n")
    (folder / "list/mapped.json").write_text(json.dumps({r["image"]: r["caption"] for r in records}))
    for name, record in zip(pictures(folder / "beside"), records, strict=True):
        (folder / "beside" / name).with_suffix(".txt").write_text("\n".join(record["caption"]))
    found = ("list/captions.json", "list/pairs.jsonl", "list/mapped.json", "list", "beside")
    return {name: str(folder / name) for name in found}


def test_every_way_to_write_captions_gives_the_same_pairs(tmp_path):
    wanted = [(f"{i}.png", captions_of(i)) for i in range(6)]
    for path in written(tmp_path).values():
        data = read_captions(path)
        assert [(record.image, record.captions) for record in data.records] == wanted
        assert data.images.load("3.png").size == (43, 32)


def test_shards_are_read_where_they_lie(tmp_path):
    tmp_path = tmp_path / "my data"  # a path with a space
    tmp_path.mkdir()
    image = {"png": png(), "txt": b" a red cat \n"}
    shard(tmp_path / "00000.tar", {"a/1": image, "2": {"png": png("blue"), "json": b'{"caption": "a dog"}'}})
    shard(tmp_path / "00001.tar", {"3": {"json": b"{}", "txt": b"last", "png": b"no picture"}})
    for path in (tmp_path, f"{tmp_path}/{{00000..00001}}.tar"):
        data = read_captions(str(path))
        assert [record.captions for record in data.records] == [["a red cat"], ["a dog"], ["last"]]
        first, second, third = (data.images.load(record.image) for record in data.records)
        assert (first.getpixel((0, 0)), second.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))
        assert isinstance(third, Skipped) and third.path == f"{tmp_path}/00001.tar/3.png" == OwnImages(data).ids[2]


def test_a_split_is_by_image_and_leaves_none_out(tmp_path):
    images = list(range(40))
    train, held = split(images, 0.2, "x")
    assert sorted(train + held) == images and len(held) == 8 and train == sorted(train)
    assert split(images, 0.2, "x") == (train, held)
    assert split(images, 0, "x") == (images, [])
    assert [len(part) for part in split(images[:2], 0.9, "x")] == [1, 1]
    with pytest.raises(UserError, match="x: one image alone"):
        split(images[:1], 0.1, "x")


def test_an_epoch_has_every_caption_once_and_knows_its_image(tmp_path):
    data = read_captions(str(captioned(tmp_path)))
    pairs = OwnPairs(data, lambda image, caption, rng: {"caption": caption, "size": image.size}, seed=0)
    for epoch in range(2):
        items = [pairs[epoch * len(pairs) + i] for i in range(len(pairs))]
        assert [item["caption"] for item in items] == [text for i in range(6) for text in captions_of(i)]
        assert [int(item["sample_ids"]) for item in items] == [i // 2 for i in range(12)]
        assert [item["size"] for item in items] == [(40 + i // 2, 32) for i in range(12)]
    held = OwnImages(data, limit=4)
    assert len(held) == 4 and held.txt2img == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [held.texts[t] for t in held.img2txt[3]] == captions_of(3) == held.references[3]


FAULTS = {
    '[{"image": "0.png"}]': "record 0: no key 'caption'",
    '[{"image": "0.png", "caption": "x"}, {"caption": "x"}]': "record 1: no key 'image'",
    '[{"image": "0.png", "caption": ""}]': "record 0: 'caption' must not be empty",
    '[{"image": "0.png", "caption": ["x", 3]}]': "record 0: 'caption' must be a text or a list",
    '[{"image": 7, "caption": "x"}]': "record 0: 'image' must be a text",
    "[3]": "record 0: it is 3",
    "[]": "expected a JSON list",
    "{": "not a JSON file",
}


@pytest.mark.parametrize("content", FAULTS)
def test_a_fault_is_one_line_with_file_and_record(tmp_path, content):
    pictures(tmp_path)
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_captions(str(path))
    assert str(error.value).startswith(f"{path}: ") and FAULTS[content] in str(error.value)
    assert "\n" not in str(error.value)
    faults = check_own(str(path), "captions").faults
    assert len(faults) == 1 and FAULTS[content] in str(faults[0])


def test_all_faults_are_listed_with_their_places(tmp_path):
    pictures(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    lines = ['{"image": "0.png", "caption": "x"}', "nonsense", '{"image": "1.png", "caption": "x"}', ""]
    lines += ['{"image": "gone.png", "caption": "x"}', '{"image": "0.png", "caption": ["x", "y"]}']
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    checked = check_own(str(tmp_path / "c.jsonl"), "captions")
    assert (checked.records, checked.images, checked.texts) == (5, 3, 5)
    told = list(map(str, checked.faults))
    assert len(told) == 3
    assert "line 2: not JSON" in told[0] and "line 3: 'image'" in told[1] and "line 5" in told[2]
    assert "1.png" in told[1] and "gone.png" in told[2]


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("gone.json", "gone.jsonl", "empty"):
        with pytest.raises(MissingFileError, match=name):
            read_captions(str(tmp_path / name))
    (tmp_path / "captions.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"captions\.csv: expected a \.json or \.jsonl"):
        read_captions(str(tmp_path / "captions.csv"))
