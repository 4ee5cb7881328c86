"""How right the answers to questions about images are: the accuracy of the VQA challenge (visualqa.org/evaluation)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe, colon and period have rules of their own
_PERIOD = re.compile(r"\.(?!\d)")
_LARGE_NUMBER = re.compile(r"\d,\d")
_ARTICLES = ("a", "an", "the")
_COUNT = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNT)} | {"none": "0"}
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
# What lacks one of its apostrophes is taken for the contraction; the last one as the official script has it.
_CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTED.split()
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


@dataclass(frozen=True)
class Asked:
    """A question that is to be answered. answers: of the annotators, or the right one; none where they are not known.
    kind: metrics are also given for each.
    """

    question_id: int | str
    answers: tuple[str, ...] = ()
    kind: str = ""


def normalise(answer: str) -> str:
    """The official normal form: lower-case, without punctuation and articles, numbers as digits, contractions with
    their apostrophes.
    """
    text, number = answer, _LARGE_NUMBER.search(answer)
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if number or beside_space else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_accuracy(given: str, answers: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1.

    answers: of the annotators. Against each set of all but one of them an answer counts min(1, those who gave it / 3),
    and the mean over these sets is its accuracy. As in the official script, answers are only normalised where the
    annotators do not all agree. One answer alone is the right one: 1 if they are the same text.
    """
    given, *answers = (" ".join(re.split(r"[\n\t]", text)).strip() for text in (given, *answers))
    if len(answers) == 1:
        return float(given == answers[0])
    if len(set(answers)) > 1:
        given, *answers = map(normalise, (given, *answers))
    same = sum(answer.lower() == given.lower() for answer in answers)
    others = len(answers) - same
    return (same * min(1, (same - 1) / 3) + others * min(1, same / 3)) / len(answers)


def accuracies(asked: Sequence[Asked], given: Sequence[str]) -> dict[str, float]:
    """ "accuracy" in per cent of the answers given, and "accuracy_<kind>" where questions are of kinds.

    Of questions without known answers, the number of "questions" alone.
    """
    found: dict[str, list[float]] = {}
    for question, answer in zip(asked, given, strict=True):
        if question.answers:
            right = answer_accuracy(answer, question.answers)
            for name in dict.fromkeys(("accuracy", f"accuracy_{question.kind}" if question.kind else "accuracy")):
                found.setdefault(name, []).append(right)
    means = {name: 100 * sum(values) / len(values) for name, values in found.items()}
    return means or {"questions": float(len(asked))}


def exact_match(asked: Sequence[Asked], given: Sequence[str]) -> float:
    """Return the share in per cent of answers that are the one that most annotators gave, of equal ones the first, but
    for upper and lower case and spaces. All questions must have answers.
    """

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    def most(answers: Sequence[str]) -> str:
        found = [plain(answer) for answer in answers]
        return max(found, key=found.count)

    same = [plain(answer) == most(question.answers) for question, answer in zip(asked, given, strict=True)]
    return 100 * sum(same) / len(same)
