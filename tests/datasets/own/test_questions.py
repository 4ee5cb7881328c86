"""A user's own questions: read, held out by image, trained on as often as people gave an answer, judged."""

import json
from collections import Counter

import pytest

from datasets.own.check import check_own
from datasets.own.questions import read_questions
from datasets.splits import split
from datasets.tasks.own_questions import OwnAnswers, OwnAsked
from datasets.vqa_accuracy import Asked, accuracies, exact_match
from sparsity.errors import UserError
from tests.own_data import pictures, questioned


def test_questions_are_read_and_numbered(tmp_path):
    data = read_questions(str(questioned(tmp_path, 3)))
    assert [record.number for record in data.records] == list(range(6))
    assert [len(group) for group in data.by_image()] == [2, 2, 2]
    asked = OwnAsked(data)
    assert asked[1]["question"] == "the photo ?" and asked.asked[1] == Asked(1, ("w0",))
    assert asked.asked[0].answers == ("red", "red", "dog") and asked[0]["image"].size == (40, 32)


def test_no_image_is_in_both_parts(tmp_path):
    data = read_questions(str(questioned(tmp_path, 10)))
    train, held = split(data.by_image(), 0.3, data.path)
    names = [{own.image for group in part for own in group} for part in (train, held)]
    assert not names[0] & names[1] and len(names[0]) == 7 and len(names[1]) == 3


def test_answers_are_learned_as_often_as_they_were_given(tmp_path):
    answers = OwnAnswers(read_questions(str(questioned(tmp_path, 1))), seed=0)
    drawn = Counter(answers[2 * epoch]["answer"] for epoch in range(600))
    assert set(drawn) == {"red", "dog"} and 350 < drawn["red"] < 450  # 400 expected, with a deviation of 12
    assert [answers[2 * epoch]["answer"] for epoch in range(9)] == [answers[2 * epoch]["answer"] for epoch in range(9)]


def test_public_files_and_ids_of_their_own_are_read(tmp_path):
    pictures(tmp_path, 1)
    record = {"image": "0.png", "question": "x ?", "answer": ["yes", ""], "question_id": "7"}
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    data = read_questions(str(tmp_path / "q.jsonl"))
    assert data.records[0].number == 7 and data.records[0].answers == ["yes", ""]
    assert {OwnAnswers(data, seed=0)[n]["answer"] for n in range(20)} == {"yes"}  # who said nothing teaches nothing


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"image": "0.png", "question": "x"}, "record 0: no key 'answers'"),
        ({"image": "0.png", "answers": "x"}, "record 0: no key 'question'"),
        ({"image": "0.png", "question": "x", "answers": []}, "record 0: 'answers' must be a text or a list"),
        ({"image": "0.png", "question": "x", "answers": ""}, "record 0: 'answers' must not be empty"),
        ({"image": "0.png", "question": "x", "answers": "y", "question_id": None}, "record 0: 'question_id' must be"),
    ],
)
def test_a_fault_names_record_and_field(tmp_path, record, fault):
    pictures(tmp_path, 1)
    (tmp_path / "questions.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=fault.replace("(", r"\(")):
        read_questions(str(tmp_path / "questions.json"))
    (found,) = check_own(str(tmp_path / "questions.json"), "questions").faults
    assert fault in str(found)


def test_what_matches_exactly():
    asked = [Asked(0, ("Red",)), Asked(1, ("two dogs", "a", "Two  Dogs")), Asked(2, ("a", "b"))]
    assert exact_match(asked, ["red ", "TWO dogs", "b"]) == pytest.approx(200 / 3)
    assert accuracies(asked[:1], ["Red"]) == {"accuracy": 100.0}
