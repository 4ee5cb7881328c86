"""Accuracy of answers: the official normal form and formula."""

import itertools

import pytest

from datasets.vqa_accuracy import Asked, accuracies, answer_accuracy, normalise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog", "dog"),
        ("a dog and an owl", "dog and owl"),
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("id", "id"),  # might be "I'd", and is not taken for it
        ("couldntve", "couldntve"),  # lacks both
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("t-shirt", "t shirt"),  # between letters punctuation is a space
        ("red, white", "red white"),  # beside a space it is nothing
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # with a large number there is no space at all
        ("3.5", "3.5"),
        ("st. mary", "st mary"),
        ("u.s.a.", "usa"),
        ("5:30", "5:30"),
        ("what?!", "what"),
        ("  spaced   out ", "spaced out"),
    ],
)
def test_normal_form(answer, normal):
    assert normalise(answer) == normal


def leave_one_out(given, answers):
    """Mean over all sets of nine annotators of min(1, agreeing / 3)."""
    others = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    return sum(min(1, rest.count(given) / 3) for rest in others) / len(answers)


@pytest.mark.parametrize("same", range(11))
def test_ten_annotators(same):
    answers = ["red"] * same + ["blue"] * (10 - same)
    assert answer_accuracy("red", answers) == pytest.approx(leave_one_out("red", answers), abs=1e-12)


def test_three_kinds_of_answers_of_any_number_of_annotators():
    for answers in itertools.product(("red", "blue", "green"), repeat=5):
        for given in ("red", "blue", "white"):
            expected = leave_one_out(given, list(answers))
            assert answer_accuracy(given, answers) == pytest.approx(expected, abs=1e-12)


def test_answers_are_compared_in_their_normal_form():
    assert answer_accuracy("2", ["two"] * 5 + ["three"] * 5) == 1
    assert answer_accuracy("The dog.", ["dog"] * 2 + ["a dog"] * 2 + ["cat"] * 6) == 1


def test_where_all_agree_the_text_counts_as_it_is():
    """So the official script has it: a shirt with a hyphen is only right with it."""
    assert answer_accuracy("t-shirt", ["t-shirt"] * 10) == answer_accuracy("T-Shirt\n", ["t-shirt\t"] * 10) == 1
    assert answer_accuracy("t shirt", ["t-shirt"] * 10) == 0


def test_one_answer_is_right_or_wrong():
    assert answer_accuracy("red apple", ["red apple"]) == 1
    assert answer_accuracy("apple", ["red apple"]) == answer_accuracy("", ["red apple"]) == 0


def test_accuracies_are_means_over_the_questions_of_a_kind():
    asked = [Asked(1, ("a1",), "what"), Asked(2, ("b1",), "what"), Asked(3, ("3",), "count"), Asked(4)]
    found = accuracies(asked, ["a1", "?", "3", "anything"])
    assert found == pytest.approx({"accuracy": 200 / 3, "accuracy_what": 50.0, "accuracy_count": 100.0})


def test_without_known_answers_there_is_no_accuracy():
    assert accuracies([Asked(1), Asked(2)], ["yes", "no"]) == {"questions": 2.0}
    plain = accuracies([Asked(1, ("yes",) * 10)], ["yes"])
    assert plain == {"accuracy": 100.0}
