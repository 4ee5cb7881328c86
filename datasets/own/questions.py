"""A user's own questions about images, with their answers: one JSON or JSON Lines file (docs/data.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.decoding import Decoding
from configs.task import OwnDataConfig
from datasets.annotations import ImageRoot, get_id, get_path, get_text, get_texts
from datasets.images import DEFAULT
from datasets.own.records import Fault, parsed, rows, whole
from datasets.splits import split

EXPECTED = '{"image": path, "question": text, "answers": text or [texts]}'


class Question(NamedTuple):
    """A question about an image. answers: of all who were asked, or the right one. number: `question_id`, or the
    record's own. where: the file and number of the record.
    """

    image: str
    question: str
    answers: list[str]
    number: int | str | None = None
    where: str = ""


@dataclass(frozen=True)
class OwnQuestions:
    """path: what they were read from."""

    path: str
    records: Sequence[Question]
    images: ImageRoot

    def by_image(self) -> list[list[Question]]:
        """Return the questions about each image."""
        groups: dict[str, list[Question]] = {}
        for record in self.records:
            groups.setdefault(record.image, []).append(record)
        return list(groups.values())


def question_rows(path: str, decoding: Decoding = DEFAULT) -> tuple[Iterator[Question | Fault], ImageRoot]:
    """Return the records of a file as they are read, and where their images are: paths are relative to its folder."""
    where = Path(path)
    if where.is_dir():
        listed = (where / name for name in ("questions.json", "questions.jsonl"))
        where = next((file for file in listed if file.is_file()), where / "questions.json")
    return parsed(rows(where, EXPECTED), _question, EXPECTED), ImageRoot(where.parent, decoding)


def read_questions(path: str, decoding: Decoding = DEFAULT) -> OwnQuestions:
    """Read a user's questions. Raises UserError or FileNotFoundError, which name file and record, where something is
    wrong with one, and where none of the images that are looked up is there.
    """
    found, images = question_rows(path, decoding)
    records = [
        record if record.number is not None else record._replace(number=n) for n, record in enumerate(whole(found))
    ]
    images.check(path, [record.image for record in records])
    return OwnQuestions(path, records, images)


def own_questions(config: OwnDataConfig) -> tuple[OwnQuestions, OwnQuestions | None]:
    """Return what a configuration trains and validates on, no image in both; None where nothing is held out."""
    assert config.data, "this configuration has other data"
    own = read_questions(config.data, config.decoding)
    if config.val_data:
        return own, read_questions(config.val_data, config.decoding)
    parts = split(own.by_image(), config.val_fraction, own.path)
    train, held = (OwnQuestions(own.path, [each for group in part for each in group], own.images) for part in parts)
    return train, held if held.records else None


def _question(record: dict, where: str) -> Question:
    key = "answer" if "answer" in record and "answers" not in record else "answers"  # as public files have it
    # Who was asked may have said nothing; who gives one answer alone has given one.
    several = isinstance(record.get(key), list)
    answers = get_texts(record, key, blank=several)
    return Question(get_path(record), get_text(record, "question"), answers, get_id(record, "question_id"), where)
