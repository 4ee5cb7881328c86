"""Questions about the bundled scenes: their answers are true, and say what can be seen."""

from collections import Counter

import numpy as np
import pytest
import torch

from datasets.bundled.captions import SceneObject
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import MAX_OBJECTS, draw_scene
from datasets.bundled.vqa import KINDS, BundledQuestions, answer_list, questions_about
from datasets.tasks.vqa import Words, bundled_questions

SIDE = 64


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture(scope="module")
def words(tokenizer):
    return Words(tokenizer, 24, add_sep=False, answer_ends=1)


def at(glyphs, concept, x, y=10):
    return SceneObject(concept, glyphs.names[concept], "noto", (x - 5, y, 10, 10), "middle")


def asked(glyphs, *objects):
    return {(q.kind, q.text): q.answer for q in questions_about(objects, 100, glyphs)}


def test_one_thing(glyphs):
    dog = glyphs.names.index("dog")
    assert asked(glyphs, at(glyphs, dog, 50)) == {
        ("count", "how many things are there"): "1",
        ("what", "what is it"): "dog",
        ("category", "which category is it"): "animals and nature",
    }


def test_sides_are_asked_about_where_one_thing_is_there(glyphs):
    a, b, c = (glyphs.names[i] for i in range(3))
    assert asked(glyphs, at(glyphs, 0, 50), at(glyphs, 1, 80), at(glyphs, 2, 20)) == {
        ("count", "how many things are there"): "3",
        ("side", f"what is left of the {a}"): c,
        ("side", f"what is right of the {a}"): b,
    }
    two_left = asked(glyphs, at(glyphs, 0, 90), at(glyphs, 1, 10), at(glyphs, 2, 30))
    assert ("side", f"what is left of the {a}") not in two_left


def test_things_above_each_other_are_not_asked_about(glyphs):
    assert list(asked(glyphs, at(glyphs, 0, 50), at(glyphs, 1, 55, 60))) == [("count", "how many things are there")]


def test_every_answer_is_in_the_list_and_true(glyphs):
    answers, kinds = answer_list(glyphs), Counter()
    assert answers == sorted(set(answers)) and len(answers) == len(glyphs) + 8 + MAX_OBJECTS
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scene = draw_scene(glyphs, rng, glyphs.train_vendors, SIDE, 1 + seed % MAX_OBJECTS)
        centres = {item.name: item.centre[0] for item in scene.objects}
        for question in questions_about(scene.objects, SIDE, glyphs):
            kinds[question.kind] += 1
            assert question.answer in answers
            if question.kind == "side":
                one = centres[question.text.split(" of the ")[1]]
                sign = -1 if "left" in question.text else 1
                assert [name for name, x in centres.items() if sign * (x - one) > 0] == [question.answer]
    assert min(kinds[kind] for kind in KINDS) > 40


def test_training_asks_each_kind_as_often(glyphs, words):
    dataset = BundledQuestions(glyphs, words, 100, side=SIDE, seed=1)
    kinds = Counter(dataset.draw(n)[1].kind for n in range(200))
    assert set(kinds) == set(KINDS) and min(kinds.values()) > 30


def test_training_items(glyphs, words):
    dataset = BundledQuestions(glyphs, words, 10, side=SIDE, seed=1)
    item, question = dataset[13], dataset.draw(13)[1]
    assert item["image"].shape == (3, SIDE, SIDE) and item["weights"] == [1.0]
    assert item["question"].tolist() == words.question(question.text).tolist()
    assert [ids.tolist() for ids in item["answers"]] == [words.answer(question.answer).tolist()]
    assert torch.equal(item["image"], dataset[13]["image"])
    assert not torch.equal(item["image"], dataset[3]["image"])  # the same index in another epoch
    assert {one.vendor for n in range(60) for one in dataset.draw(n)[0].objects} == set(glyphs.train_vendors)
    with pytest.raises(ValueError, match="length must be at least 1"):
        BundledQuestions(glyphs, words, 0, side=SIDE, seed=1)


@pytest.mark.script
def test_evaluation_asks_everything_about_fixed_scenes(glyphs, words):
    questions = bundled_questions("unseen_scenes", 12, SIDE, words, seed=0)
    again = bundled_questions("unseen_scenes", 12, SIDE, words, seed=0)
    assert questions.asked == again.asked and len(questions) == 12
    assert torch.equal(questions[3]["image"], again[3]["image"])
    numbers = [number for i in range(12) for number in questions[i]["numbers"]]
    assert numbers == list(range(len(questions.asked)))
    scene = questions.load.args[0].scene(3)
    assert {item.vendor for item in scene.objects} == {glyphs.unseen_vendor}
    expected = questions_about(scene.objects, SIDE, glyphs)
    assert [questions.asked[n].answers for n in questions[3]["numbers"]] == [(q.answer,) for q in expected]
    other = bundled_questions("scenes", 12, SIDE, words, seed=1)
    assert other.asked != bundled_questions("scenes", 12, SIDE, words, seed=0).asked
