"""A user's own questions as what is trained on and answered by models that preprocess images and texts themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from datasets.annotations import Records
from datasets.collate import Skipped
from datasets.own.questions import OwnQuestions, Question
from datasets.sampler import sample_generator
from datasets.tasks.vqa_accuracy import Asked


class OwnAnswers(Dataset):
    """Questions with one of their answers, drawn anew in each epoch: by running numbers n = epoch * len + index.

    An item is {"image": RGB image, "question": text, "answer": text}, or `Skipped` where the image cannot be read.
    """

    def __init__(self, data: OwnQuestions, *, seed: int):
        self.images, self.seed = data.images, seed
        self.records = Records((own.image, own.question, _said(own)) for own in data.records if _said(own))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        name, question, answers = self.records[index]
        image = self.images.load(name)
        if isinstance(image, Skipped):
            return image
        return {"image": image, "question": question, "answer": answers[int(rng.integers(len(answers)))]}


class OwnAsked(Dataset):
    """Questions to be answered: item i is {"image": RGB image, "question": text, "index": i}, or `Skipped`.

    asked: the questions in their order. limit: only the first so many.
    """

    def __init__(self, data: OwnQuestions, limit: int | None = None):
        records = data.records[:limit]
        self.images = data.images
        self.records = Records((own.image, own.question) for own in records)
        self.asked = [
            Asked(own.number if own.number is not None else i, tuple(own.answers)) for i, own in enumerate(records)
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any] | Skipped:
        name, question = self.records[i]
        image = self.images.load(name)
        if isinstance(image, Skipped):
            return image
        return {"image": image, "question": question, "index": torch.tensor(i)}


def _said(own: Question) -> list[str]:
    """Return the answers without those of who said nothing."""
    return [answer for answer in own.answers if answer.strip()]
