"""Questions and answers in the layouts of VQA2 and Visual Genome: templates, weights, mirrored images, bad input."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from configs.finetuning import VQAConfig
from configs.task import OptimizerConfig, SchedulerConfig
from datasets.collate import Skipped
from datasets.tasks.vqa import Images, VQATrainDataset, Words, candidates, evaluation_sets, file_questions, training_set
from datasets.transforms import CLIP, EvalTransform, to_tensor

TEN = ["red"] * 5 + ["dark red"] * 3 + ["blue", "green"]
ASKED = {"image": "val2014/1.png", "question": "What color is it?", "answer": TEN, "dataset": "vqa", "question_id": 7}
GENOME = {"image": "image/2.png", "question": "Where is the cat?", "answer": "on the bed", "dataset": "vg"}


@pytest.fixture
def words(tokenizer):
    return Words(tokenizer, 12, add_sep=False, answer_ends=1)


@pytest.fixture
def roots(tmp_path, write_image):
    for number, path in enumerate(("coco/val2014/1.png", "coco/val2014/3.png", "vg/2.png")):
        write_image(tmp_path / path, seed=number)
    return {"vqa": str(tmp_path / "coco"), "vg": str(tmp_path / "vg")}


@pytest.fixture
def images(roots):
    return Images(roots)


def plain(image, rng):
    return to_tensor(image)


def training(path, images, words, seed=0):
    return VQATrainDataset([path], images, plain, words, seed=seed)


def text(tokenizer, ids):
    return [tokenizer.id_to_token(int(i)) for i in ids]


# Templates


@pytest.mark.parametrize(
    ("ends", "question", "answer"),
    [
        ({"add_sep": False, "answer_ends": 1}, "[CLS] is it red", "[CLS] dark red [SEP]"),
        ({"add_sep": True, "answer_ends": 2}, "[CLS] is it red [SEP]", "[CLS] dark red [SEP] [SEP]"),
    ],
)
def test_templates(tokenizer, ends, question, answer):
    words = Words(tokenizer, 12, **ends)
    assert " ".join(text(tokenizer, words.question("Is it, RED?"))) == question
    assert " ".join(text(tokenizer, words.answer("Dark red"))) == answer


def test_what_is_too_long_is_cut_and_still_ends(tokenizer):
    words = Words(tokenizer, 5, add_sep=True, answer_ends=2)
    assert text(tokenizer, words.question("red red red red red red")) == ["[CLS]", "red", "red", "red", "[SEP]"]
    assert text(tokenizer, words.answer("red red red red red")) == ["[CLS]", "red", "red", "[SEP]", "[SEP]"]
    with pytest.raises(ValueError, match="max_tokens must be at least 4"):
        Words(tokenizer, 3, add_sep=True, answer_ends=2)


def test_padding(tokenizer, words):
    padded = words.padded("answer", [words.answer("red"), words.answer("dark red")])
    assert padded["answer_ids"].shape == padded["answer_atts"].shape == (2, 4)
    assert padded["answer_atts"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded["answer_ids"][0, 3] == tokenizer.pad_id


# Training


def test_answers_are_weighted_by_the_annotators(tmp_path, write_json, images, words):
    path = write_json(tmp_path / "a.json", [ASKED, GENOME, {**ASKED, "answer": "red"}])
    items = [training(path, images, words)[n] for n in range(3)]
    assert [item["weights"] for item in items] == [[0.5, 0.3, 0.1, 0.1], [0.5], [1.0]]
    for item, answers in zip(items, (["red", "dark red", "blue", "green"], ["on the bed"], ["red"]), strict=True):
        assert [ids.tolist() for ids in item["answers"]] == [words.answer(answer).tolist() for answer in answers]


def test_only_the_base_name_counts_in_visual_genome(tmp_path, write_json, images, words):
    path = write_json(tmp_path / "a.json", [GENOME])
    with Image.open(tmp_path / "vg/2.png") as image:
        expected = to_tensor(image.convert("RGB"))
    item = training(path, images, words)[0]
    assert torch.equal(item["image"], expected) or torch.equal(item["image"], expected.flip(-1))


@pytest.mark.parametrize(
    ("question", "answer", "mirrored"),
    [
        ("What is it?", "a cat", True),
        ("What is on the left?", "a cat", False),
        ("Which side?", ["RIGHT"] * 9 + ["left"], False),
        ("Which side?", ["bright"] * 9 + ["up"], True),
    ],
)
def test_half_of_the_images_are_mirrored_unless_a_side_is_spoken_of(
    tmp_path, write_json, images, words, question, answer, mirrored
):
    path = write_json(tmp_path / "a.json", [{**ASKED, "question": question, "answer": answer}])
    dataset = training(path, images, words)
    with Image.open(tmp_path / "coco/val2014/1.png") as image:
        expected = to_tensor(image.convert("RGB"))
    flipped = [torch.equal(dataset[epoch]["image"], expected.flip(-1)) for epoch in range(200)]
    assert all(f or torch.equal(dataset[n]["image"], expected) for n, f in enumerate(flipped))
    assert (70 < sum(flipped) < 130) if mirrored else not any(flipped)


def test_an_item_is_a_function_of_seed_and_running_number(tmp_path, write_json, images, words):
    path = write_json(tmp_path / "a.json", [ASKED, GENOME])
    seen = [training(path, images, words, seed=s)[n]["image"] for s in (3, 4) for n in range(40)]
    again = [training(path, images, words, seed=s)[n]["image"] for s in (3, 4) for n in range(40)]
    assert all(map(torch.equal, seen, again))
    assert not all(map(torch.equal, seen[:40], seen[40:]))


def test_a_batch_knows_the_question_of_each_answer(tmp_path, write_json, images, words):
    path = write_json(tmp_path / "a.json", [ASKED, {**GENOME, "image": "gone/9.png"}, GENOME])
    dataset = training(path, images, words)
    batch = words.gather_training([dataset[n] for n in range(3)])
    assert batch["image"].shape == (2, 3, 30, 40) and len(batch["skipped"]) == 1
    assert batch["answer_owner"].tolist() == [0, 0, 0, 0, 1]
    assert batch["answer_weights"].tolist() == pytest.approx([0.5, 0.3, 0.1, 0.1, 0.5])
    assert len(batch["answer_ids"]) == 5 and len(batch["text_ids"]) == 2
    lost = Skipped("x", "y")
    assert words.gather_training([lost]) == {"skipped": [lost]}
    assert words.gather_asked([lost]) == {"skipped": [lost]}


# Questions that are answered


def test_questions_are_grouped_by_image(tmp_path, write_json, images, words):
    other = {"image": "val2014/3.png", "dataset": "vqa", "question": "How many?", "question_id": "x"}
    records = [ASKED, other, {**ASKED, "question_id": 8, "question": "Is it red?"}]
    questions = file_questions([write_json(tmp_path / "a.json", records)], images, 16, words)
    assert len(questions) == 2
    assert [(q.question_id, len(q.answers)) for q in questions.asked] == [(7, 10), (8, 10), ("x", 0)]
    batch = words.gather_asked([questions[0], questions[1]])
    assert batch["image_of"].tolist() == [0, 0, 1] and batch["number"].tolist() == [0, 1, 2]
    assert batch["text_ids"][1, : batch["text_atts"][1].sum()].tolist() == words.question("is it red").tolist()
    with Image.open(tmp_path / "coco/val2014/3.png") as image:
        assert torch.equal(batch["image"][1], EvalTransform(16)(image.convert("RGB")))
    assert len(file_questions([tmp_path / "a.json"], images, 16, words, limit=1).asked) == 2


def test_an_image_that_cannot_be_read_is_skipped(tmp_path, write_json, images, words):
    (tmp_path / "coco/val2014/1.png").write_bytes(b"no image")
    questions = file_questions([write_json(tmp_path / "a.json", [ASKED])], images, 16, words)
    assert isinstance(questions[0], Skipped)
    assert isinstance(training(tmp_path / "a.json", images, words)[0], Skipped)


# Bad input


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**ASKED, "dataset": "gqa"}, "record 0: 'dataset' must be 'vqa' or 'vg', got 'gqa'"),
        ({**ASKED, "answer": []}, "record 0: 'answer' must be a text or a list of at least one text"),
        ({"image": "val2014/1.png", "question": "?"}, "record 0: no key 'answer'"),
        ({"image": "val2014/1.png", "answer": "x"}, "record 0: no key 'question'"),
    ],
)
def test_records_that_cannot_be_trained_on(tmp_path, write_json, images, words, record, message):
    with pytest.raises(ValueError, match=message):
        training(write_json(tmp_path / "a.json", [record]), images, words)


def test_a_question_of_a_test_set_needs_its_number(tmp_path, write_json, images, words):
    path = write_json(tmp_path / "a.json", [{**ASKED, "question_id": None}])
    with pytest.raises(ValueError, match="a.json: record 0: 'question_id' must be a number or a text, got None"):
        file_questions([path], images, 16, words)


def test_image_folders_that_are_not_there(tmp_path, write_json, roots, words):
    path = write_json(tmp_path / "a.json", [ASKED, GENOME])
    with pytest.raises(ValueError, match="a.json: has questions of the dataset 'vg': set vg_root"):
        training(path, Images({**roots, "vg": None}), words)
    with pytest.raises(FileNotFoundError, match="none of 1 images"):
        training(path, Images({**roots, "vg": roots["vqa"]}), words)


def config(tmp_path, roots, **changes):
    files = {"train_file": [str(tmp_path / "t.json")], "test_file": [str(tmp_path / "t.json")]}
    options = {**files, "answer_list": str(tmp_path / "a.json"), "vqa_root": roots["vqa"], "vg_root": roots["vg"]}
    sizes = {"model_config": "m", "weights": "random", "batch_size_train": 2, "batch_size_target": 2}
    parts = {"optimizer": OptimizerConfig(1e-3), "scheduler": SchedulerConfig(1)}
    return VQAConfig(**sizes, **parts, **(options | changes))


def test_a_configuration_of_files(tmp_path, write_json, roots, words):
    write_json(tmp_path / "t.json", [{**ASKED, "question_id": i} for i in range(3)])
    write_json(tmp_path / "a.json", ["red", "blue"])
    settings = config(tmp_path, roots)
    settings.check_data("here")
    assert candidates(settings) == ["red", "blue"]
    assert len(training_set(settings, words, 16, seed=0)) == 3
    assert list(evaluation_sets(settings, words, 16)) == ["test"]
    both = config(tmp_path, roots, val_file=[str(tmp_path / "t.json")])
    assert list(evaluation_sets(both, words, 16)) == ["val", "test"]
    write_json(tmp_path / "t.json", [{key: value for key, value in ASKED.items() if key != "answer"}])
    with pytest.raises(ValueError, match="t.json: record 0: no key 'answer'"):  # by which weights are to be chosen
        evaluation_sets(both, words, 16)
    assert list(evaluation_sets(settings, words, 16)) == ["test"]


@pytest.mark.parametrize("missing", ["train_file", "test_file", "answer_list", "vqa_root"])
def test_a_configuration_without_data(tmp_path, roots, missing):
    with pytest.raises(ValueError, match=f"here: no data: set {missing}, or bundled"):
        config(tmp_path, roots, **{missing: None}).check_data("here")


def test_files_that_are_not_there(tmp_path, write_json, roots):
    with pytest.raises(FileNotFoundError, match="t.json: annotation file not found"):
        config(tmp_path, roots).check_data("here")
    write_json(tmp_path / "t.json", [ASKED])
    with pytest.raises(FileNotFoundError, match="a.json: annotation file not found"):
        config(tmp_path, roots).check_data("here")
    write_json(tmp_path / "a.json", ["red"])
    with pytest.raises(FileNotFoundError, match="nowhere: image folder not found"):
        config(tmp_path, roots, vg_root="nowhere").check_data("here")


@pytest.mark.parametrize("content", [[], ["red", 3], {"red": 0}, ["red", " "], "no json"])
def test_lists_of_answers_that_are_none(tmp_path, write_json, roots, content):
    write_json(tmp_path / "a.json", content)
    with pytest.raises(
        ValueError, match=r"a.json: .*(list of texts, the answers that there are|answer 1: .*not be empty)"
    ):
        candidates(config(tmp_path, roots))


def test_normalised_as_training_of_clip(roots, images, tmp_path, write_json, words):
    """Crops of a plain image keep its colour: the transform of training neither mirrors nor shifts it."""
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "coco/val2014/1.png")
    write_json(tmp_path / "t.json", [ASKED])
    write_json(tmp_path / "a.json", ["red"])
    dataset = training_set(config(tmp_path, roots), words, 16, seed=0)
    dataset.transform.augment = lambda image, rng: image
    assert not dataset.transform.flip and dataset.transform.scale == (0.5, 1.0)
    red = np.subtract((1, 0, 0), CLIP[0]) / CLIP[1]
    assert np.allclose(dataset[0]["image"].mean((1, 2)).numpy(), red, atol=1e-4)
    assert Counter(type(item) for item in (dataset[n] for n in range(3))) == {dict: 3}
