"""Data of captioning: COCO's files, the bundled scenes with several references, pairs of files and shards."""

import collections
import io
import itertools
import tarfile

import numpy as np
import pytest
import torch

from configs.finetuning import BundledPairs, CaptionedScenes, CaptioningConfig, CaptioningPretrainConfig
from configs.sources import Files
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from datasets.collate import Skipped, collate
from datasets.pairs.pretraining import ImageTextDataset
from datasets.place import Place
from datasets.tasks.captioning import BundledCaptions, CaptioningEvalDataset, evaluation_sets, prompted, training_set
from datasets.tasks.captioning_pretraining import Pairs, read
from datasets.tasks.captioning_pretraining import training_set as pretraining_set
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform

PROMPT = "a picture of "
COMMON = {
    "model_config": "m.yaml",
    "weights": "random",
    "optimizer": None,
    "scheduler": None,
    "batch_size_train": 2,
    "batch_size_target": 2,
}


@pytest.fixture(scope="session")
def glyphs():
    return load_glyphs()


@pytest.fixture
def encode(tokenizer):
    return TextEncoder(tokenizer, 16, add_sep=True)


@pytest.fixture
def coco(tmp_path, write_image, write_json):
    """Two images with their captions, and the file of references."""
    for image in ("val2014/COCO_val2014_000000000042.png", "val2014/COCO_val2014_000000000007.png"):
        write_image(tmp_path / image)
    records = [
        {"image": "val2014/COCO_val2014_000000000042.png", "caption": ["A cat.", "one cat"]},
        {"image": "val2014/COCO_val2014_000000000007.png", "caption": ["dogs"]},
    ]
    captions = [(7, "two dogs"), (42, "a cat"), (7, "Dogs!"), (1, "not here")]
    annotations = [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(captions)]
    gt = {"images": [{"id": i} for i, _ in captions], "annotations": annotations}
    return write_json(tmp_path / "val.json", records), write_json(tmp_path / "val_gt.json", gt), tmp_path


# Evaluation


def test_ids_are_the_digits_of_the_file_names(coco):
    file, _, root = coco
    data = CaptioningEvalDataset(file, root, EvalTransform(32))
    assert data.ids == [42, 7] and data.references == [["A cat.", "one cat"], ["dogs"]]
    item = data[1]
    assert item["image"].shape == (3, 32, 32) and item["index"] == 1


def test_references_of_a_file_of_their_own(coco):
    file, gt_file, root = coco
    data = CaptioningEvalDataset(file, root, EvalTransform(32), gt_file=gt_file)
    assert data.references == [["a cat"], ["two dogs", "Dogs!"]]
    assert CaptioningEvalDataset(file, root, EvalTransform(32), 1, gt_file=gt_file).references == [["a cat"]]


def test_image_ids_as_texts(coco, write_json):
    file, _, root = coco
    captions = [{"image_id": "000042", "caption": "a"}, {"image_id": "7", "caption": "b"}]
    gt_file = write_json(root / "texts.json", {"annotations": captions})
    assert CaptioningEvalDataset(file, root, EvalTransform(32), gt_file=gt_file).references == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[{", "not a JSON file"),
        ([], "no list 'annotations'"),
        ({"images": []}, "no list 'annotations'"),
        ({"annotations": [{"image_id": 42}]}, "annotation 0 is {'image_id': 42}"),
        ({"annotations": [{"image_id": None, "caption": "a"}]}, "annotation 0 is .* 'image_id' must be a number"),
        ({"annotations": ["a"]}, "annotation 0 is 'a'"),
        ({"annotations": [{"image_id": 42, "caption": "a"}]}, "no caption of image 7, which .*val.json has"),
    ],
)
def test_references_that_cannot_be_used(coco, write_json, content, told):
    file, _, root = coco
    gt_file = write_json(root / "bad.json", content)
    with pytest.raises(ValueError, match=rf"bad.json: .*{told}"):
        CaptioningEvalDataset(file, root, EvalTransform(32), gt_file=gt_file)


def test_files_that_are_not_there(coco):
    file, _, root = coco
    with pytest.raises(FileNotFoundError, match="absent.json: annotation file not found"):
        CaptioningEvalDataset(file, root, EvalTransform(32), gt_file=root / "absent.json")
    with pytest.raises(FileNotFoundError, match="absent.json: annotation file not found"):
        CaptioningEvalDataset(root / "absent.json", root, EvalTransform(32))


def test_an_image_that_cannot_be_read(coco):
    file, _, root = coco
    (root / "val2014/COCO_val2014_000000000007.png").write_bytes(b"no image")
    assert isinstance(CaptioningEvalDataset(file, root, EvalTransform(32))[1], Skipped)


# The bundled scenes


def bundled(**sizes):
    config = CaptionedScenes(**{"train_scenes": 6, "val_scenes": 3, "test_scenes": 4} | sizes)
    return CaptioningConfig(**COMMON, bundled=config)


def test_bundled_scenes_are_fixed_and_have_true_references(glyphs):
    data = BundledCaptions(glyphs, "scenes", 6, side=48)
    again = BundledCaptions(glyphs, "scenes", 6, side=48)
    assert data.references == again.references and list(data.ids) == list(range(6))
    for i in range(6):
        assert torch.equal(data[i]["image"], again[i]["image"]) and data[i]["index"] == i
        scene = data.scene(i)
        assert data.references[i][0] == scene.caption and len(data.references[i]) == 5
        for caption in data.references[i]:
            assert all(item.name in caption for item in scene.objects)
    assert any(len(set(captions)) > 2 for captions in data.references)


def test_sets_of_the_bundled_scenes():
    sets = evaluation_sets(bundled(), 48)
    assert list(sets) == ["val", "scenes", "unseen_scenes"] and [len(s) for s in sets.values()] == [3, 4, 4]
    assert sets["val"].references[0] != sets["scenes"].references[0]
    assert [len(s) for s in evaluation_sets(bundled(val_scenes=90, test_scenes=90), 48, debug=True).values()] == [
        32
    ] * 3


def test_training_scenes_are_drawn_anew_in_each_epoch(encode, tokenizer):
    data = training_set(bundled(), encode, 48, seed=3)
    assert len(data) == 6
    assert torch.equal(data[2]["image"], data[2]["image"]) and not torch.equal(data[2]["image"], data[8]["image"])
    ids = data[2]["text_ids"].tolist()
    words = tokenizer.encode(PROMPT)
    assert ids[: 1 + len(words)] == [tokenizer.cls_id, *words] and tokenizer.sep_id in ids
    assert "text_ids_masked" not in data[2]


def test_a_long_caption_keeps_its_end(encode, tokenizer):
    fields = prompted(encode, PROMPT, "cat " * 40, np.random.default_rng(0))
    assert fields["text_atts"].sum() == 16 and fields["text_ids"][-1] == tokenizer.sep_id


def test_training_files(tmp_path, encode, tokenizer, glyphs):
    export_public(tmp_path, 4, glyphs, side=48)
    file = str(tmp_path / "data/finetune/itr/coco_train.json")
    config = CaptioningConfig(**COMMON, train_file=[file], image_root=str(tmp_path / "images/coco"))
    data = training_set(config, encode, 32, seed=3)
    assert len(data) == 4 and data[0]["image"].shape == (3, 32, 32)
    assert tokenizer.decode(data[0]["text_ids"]).startswith(PROMPT)


# Pretraining on files and shards


class Numbers(torch.utils.data.Dataset):
    """Item n is its number in an epoch."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, n):
        return {"number": torch.tensor(n % self.size)}


def numbers(batches):
    return [tuple(batch["number"].tolist()) for batch in batches]


def test_files_alone_are_read_as_any_other_set():
    pairs = Pairs(Numbers(10), None)
    found = numbers(read(pairs, 2, collate, seed=1, start=0, stop=5))
    assert sorted(itertools.chain(*found)) == list(range(10)) and len(pairs) == 10
    assert numbers(read(pairs, 2, collate, seed=1, start=3, stop=5)) == found[3:]


@pytest.fixture
def mixed(tmp_path, encode, glyphs):
    """Twelve images in a file, and six in two shards."""
    export_public(tmp_path, 12, glyphs, side=48)
    images = sorted((tmp_path / "images/cc3m/bundled").iterdir())[:6]
    for shard, own in enumerate((images[:3], images[3:])):
        write_shard(tmp_path / f"{shard:05d}.tar", own)
    files = [
        Files(str(tmp_path / "data/pretrain/coco_karpathy_gby_image.json"), str(tmp_path / "images/coco")),
        Files("", str(tmp_path / "{00000..00001}.tar")),
    ]
    return pretraining_set(CaptioningPretrainConfig(**COMMON, train=files), encode, 32, seed=5)


def write_shard(path, images):
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(images):
            for name, content in ((f"{i:09d}.png", image.read_bytes()), (f"{i:09d}.txt", b"a shard")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def texts(batch, tokenizer):
    return [tokenizer.decode(ids) for ids in batch["text_ids"]]


def test_files_and_shards_are_read_in_proportion(mixed, tokenizer):
    batches = list(read(mixed, 2, collate, seed=1, start=0, stop=9))
    kinds = ["shard" if "a shard" in texts(batch, tokenizer) else "file" for batch in batches]
    assert len(mixed) == 18 and collections.Counter(kinds) == {"file": 6, "shard": 3}
    assert all(kinds[i : i + 3].count("shard") == 1 for i in (0, 3, 6))
    assert all(
        set(texts(batch, tokenizer)) == {"a shard"}
        for batch, kind in zip(batches, kinds, strict=True)
        if kind == "shard"
    )


def test_a_mixture_is_resumed_where_it_was_left(mixed):
    whole = list(read(mixed, 2, collate, seed=1, start=0, stop=12))
    for start in (1, 4, 9):
        rest = list(read(mixed, 2, collate, seed=1, start=start, stop=12))
        for found, expected in zip(rest, whole[start:], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_ranks_share_a_mixture(mixed):
    options = {"seed": 1, "start": 0}
    parts = [list(read(mixed, 2, collate, stop=6, place=Place(rank, 2), **options)) for rank in range(2)]
    ours = sorted(float(image.sum()) for part in parts for batch in part for image in batch["image"])
    whole = sorted(
        float(image.sum()) for batch in read(mixed, 2, collate, stop=12, **options) for image in batch["image"]
    )
    assert ours == whole and len(whole) == 24


def test_what_is_pretrained_on(mixed, encode):
    assert isinstance(mixed.indexed, ImageTextDataset) and "text_ids_masked" not in mixed.indexed[0]
    scenes = pretraining_set(CaptioningPretrainConfig(**COMMON, bundled=BundledPairs(7)), encode, 32, seed=5)
    assert len(scenes) == 7 and scenes.shards is None
