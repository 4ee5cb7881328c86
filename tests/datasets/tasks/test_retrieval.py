import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets.collate import Skipped, collate
from datasets.tasks.retrieval import RetrievalEvalDataset, RetrievalTrainDataset, recall
from datasets.transforms import FINETUNING_SCALE, EvalTransform, TrainTransform

IMG2TXT = [[0, 1], [2], [3, 4, 5]]
TXT2IMG = [0, 0, 1, 2, 2, 2]


@pytest.fixture
def folder(tmp_path, write_image, write_json):
    for i in range(3):
        write_image(tmp_path / "coco" / f"{i}.jpg", seed=i)
    (tmp_path / "coco" / "1.jpg").write_bytes(b"\xff\xd8broken")
    captions = ["a dog", "the dog"], "a cat", ["one", "two", "three"]
    records = [{"image": f"coco/{i}.jpg", "caption": caption} for i, caption in enumerate(captions)]
    write_json(tmp_path / "coco_test.json", records)
    return tmp_path


def test_images_texts_and_maps(folder):
    data = RetrievalEvalDataset(folder / "coco_test.json", folder / "coco", EvalTransform(16))
    assert data.texts == ["a dog", "the dog", "a cat", "one", "two", "three"]
    assert data.img2txt == IMG2TXT and data.txt2img == TXT2IMG and len(data) == len(data.images) == 3
    assert isinstance(data[1], Skipped)
    (batch,) = DataLoader(data, batch_size=3, collate_fn=collate)
    assert batch["index"].tolist() == [0, 2] and batch["image"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "no record"), ([{"image": "0.jpg"}], "record 0: no key 'caption'"), ([{"caption": ["a"]}], "no key 'image'")],
)
def test_a_bad_annotation_file_is_one_line_at_startup(folder, write_json, content, message):
    write_json(folder / "bad.json", content)
    with pytest.raises(ValueError, match=message):
        RetrievalEvalDataset(folder / "bad.json", folder / "coco", EvalTransform(16))
    with pytest.raises(FileNotFoundError, match="annotation file not found"):
        RetrievalEvalDataset(folder / "none.json", folder / "coco", EvalTransform(16))
    with pytest.raises(FileNotFoundError, match="image folder not found"):
        RetrievalEvalDataset(folder / "coco_test.json", folder / "images", EvalTransform(16))


def matching():
    """1 where image and text belong together, (I, T)."""
    return (torch.tensor(TXT2IMG)[None, :] == torch.arange(3)[:, None]).float()


def test_perfect_scores():
    scores = matching()
    result = recall(scores, scores.T, TXT2IMG, IMG2TXT, ks=(1, 2))
    assert result.keys() == {
        *("txt_r1", "txt_r2", "img_r1", "img_r2", "txt_r_mean", "img_r_mean", "r_mean"),
    }
    assert set(result.values()) == {100.0}


@pytest.mark.parametrize("value", [0.0, -100.0, float("-inf"), float("inf"), float("nan")])
def test_equal_scores_find_nothing_by_luck(value):
    scores = torch.full((3, 6), value)
    result = recall(scores, scores.T, TXT2IMG, IMG2TXT, ks=(1, 2))
    assert set(result.values()) == {0.0}


def test_a_match_of_nan_is_not_found_even_with_few_candidates():
    scores = torch.full((3, 6), torch.nan)
    assert recall(scores, scores.T, TXT2IMG, IMG2TXT)["r_mean"] == 0.0
    scores = matching()
    scores[1] = torch.nan  # an image that could not be read
    result = recall(scores, scores.T, TXT2IMG, IMG2TXT, ks=(1,))
    assert result["txt_r1"] == pytest.approx(200 / 3) and result["img_r1"] == pytest.approx(500 / 6)


def test_nan_of_others_is_worse_than_any_score():
    scores = torch.where(matching() == 1, -5.0, torch.nan)
    assert recall(scores, scores.T, TXT2IMG, IMG2TXT, ks=(1,))["r_mean"] == 100.0


def test_a_tie_with_one_other_costs_one_rank():
    scores = matching()
    scores[0, 2] = 1.0
    result = recall(scores, scores.T, TXT2IMG, IMG2TXT, ks=(1, 2))
    assert result["txt_r1"] == pytest.approx(200 / 3) and result["txt_r2"] == 100
    assert result["img_r1"] == pytest.approx(500 / 6) and result["img_r2"] == 100


def test_equals_the_published_formula_without_ties():
    rng = np.random.default_rng(0)
    img2txt = [list(range(i * 5, i * 5 + 5)) for i in range(20)]
    txt2img = [i // 5 for i in range(100)]
    i2t, t2i = rng.normal(size=(20, 100)), rng.normal(size=(100, 20))
    txt = [min(np.argsort(-row).tolist().index(t) for t in own) for row, own in zip(i2t, img2txt, strict=True)]
    img = [np.argsort(-row).tolist().index(i) for row, i in zip(t2i, txt2img, strict=True)]
    result = recall(torch.from_numpy(i2t), torch.from_numpy(t2i), txt2img, img2txt)
    for k in (1, 5, 10):
        assert result[f"txt_r{k}"] == pytest.approx(100 * np.mean(np.array(txt) < k))
        assert result[f"img_r{k}"] == pytest.approx(100 * np.mean(np.array(img) < k))
    assert result["r_mean"] == pytest.approx(np.mean([result[f"{n}_r{k}"] for n in ("txt", "img") for k in (1, 5, 10)]))


def test_misshapen_scores_are_an_error():
    with pytest.raises(ValueError, match=r"scores must be \(3, 6\) and \(6, 3\)"):
        recall(matching(), matching(), TXT2IMG, IMG2TXT)


# Training


def encode(caption, rng):
    return {"caption": caption, "draw": torch.tensor(rng.random())}


@pytest.fixture
def pairs(folder, write_json):
    """Two annotation files: five captions of three images, one of which cannot be read."""
    first = [
        {"image": "0.jpg", "caption": "a dog", "image_id": 7},
        {"image": "0.jpg", "caption": "the dog", "image_id": "7"},
        {"image": "1.jpg", "caption": "a cat", "image_id": "coco_1"},
    ]
    second = [{"image": "coco/2.jpg", "caption": ["one", "two"]}]
    files = [write_json(folder / name, records) for name, records in (("a.json", first), ("b.json", second))]
    return RetrievalTrainDataset(files, folder / "coco", TrainTransform(16, FINETUNING_SCALE), encode, seed=3)


def test_every_caption_is_an_item_that_knows_its_image(pairs):
    items = [pairs[i] for i in range(len(pairs))]
    assert [isinstance(item, Skipped) for item in items] == [False, False, True, False, False]
    read = [item for item in items if not isinstance(item, Skipped)]
    assert [item["caption"] for item in read] == ["a dog", "the dog", "one", "two"]
    assert [int(item["sample_ids"]) for item in read] == [0, 0, 2, 2]
    assert all(item["image"].shape == (3, 16, 16) for item in read)


def test_an_item_is_a_function_of_seed_epoch_and_index(pairs):
    epochs = [[pairs[epoch * len(pairs) + i] for i in (4, 0)] for epoch in (0, 1, 0)]
    for first, again in zip(epochs[0], epochs[2], strict=True):
        assert torch.equal(first["image"], again["image"]) and first["draw"] == again["draw"]
    assert not torch.equal(epochs[0][0]["image"], epochs[1][0]["image"]) and epochs[0][0]["caption"] == "two"
    pairs.seed = 4
    assert not torch.equal(pairs[4]["image"], epochs[0][0]["image"])


def test_bad_pairs_are_refused(folder, write_json):
    for records, told in (([{"image": "0.jpg", "caption": []}], "record 0: 'caption' must be"), ([], "no record")):
        write_json(folder / "bad.json", records)
        with pytest.raises(ValueError, match=told):
            RetrievalTrainDataset([folder / "bad.json"], folder / "coco", TrainTransform(16), encode, seed=0)
    write_json(folder / "far.json", [{"image": "far.jpg", "caption": "x"}])
    with pytest.raises(FileNotFoundError, match="none of 1 images of"):
        RetrievalTrainDataset([folder / "far.json"], folder / "coco", TrainTransform(16), encode, seed=0)


def test_a_part_of_the_evaluation_set(folder):
    data = RetrievalEvalDataset(folder / "coco_test.json", folder / "coco", EvalTransform(16), limit=2)
    assert len(data) == 2 and data.img2txt == IMG2TXT[:2] and data.txt2img == TXT2IMG[:3]


def one_row(scores, matches):
    """Rank of the best match of a query, plainly."""
    known = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = known[matches].max()
    ahead = (known >= best).sum() - (known[matches] >= best).sum()
    return torch.inf if scores[matches].isnan().all() else float(ahead)


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_loop_over_queries(seed):
    """With ties, NaN and infinite scores, and images with different numbers of texts."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, 8)
    txt2img = np.repeat(np.arange(8), counts).tolist()
    order = rng.permutation(len(txt2img))  # texts of an image need not stand together
    txt2img = [txt2img[i] for i in order]
    img2txt = [[t for t, i in enumerate(txt2img) if i == image] for image in range(8)]
    values = np.array([-np.inf, -100.0, 0.0, 1.0, 2.0, np.inf, np.nan])
    i2t = torch.from_numpy(rng.choice(values, (8, len(txt2img))))
    t2i = torch.from_numpy(rng.choice(values, (len(txt2img), 8)))
    txt = torch.tensor([one_row(row, own) for row, own in zip(i2t, img2txt, strict=True)])
    img = torch.tensor([one_row(row, [i]) for row, i in zip(t2i, txt2img, strict=True)])
    found = recall(i2t, t2i, txt2img, img2txt)
    for k in (1, 5, 10):
        assert found[f"txt_r{k}"] == pytest.approx(100 * (txt < k).float().mean().item())
        assert found[f"img_r{k}"] == pytest.approx(100 * (img < k).float().mean().item())
