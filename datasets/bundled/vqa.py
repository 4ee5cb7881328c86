"""Questions about the bundled scenes, whose answers stand in the scenes' annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.bundled.captions import SceneObject
from datasets.bundled.glyphs import Glyphs, image_tensor
from datasets.bundled.scenes import MAX_OBJECTS, Scene, draw_scene
from datasets.sampler import sample_generator
from sparsity.errors import UserError

KINDS = {"what": (1, 1), "category": (1, 1), "count": (1, MAX_OBJECTS), "side": (2, MAX_OBJECTS)}  # objects they need
APART = 0.1  # of the side: the least distance across of two things of which one is left of the other


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


class Encode(Protocol):
    """Texts to token ids, as `datasets.tasks.vqa.Words`."""

    question: Callable[[str], torch.Tensor]
    answer: Callable[[str], torch.Tensor]


def questions_about(objects: Sequence[SceneObject], side: int, glyphs: Glyphs) -> list[Question]:
    """All that can be asked about the objects of a scene of `side` pixels and has one answer."""
    found = [Question("count", "how many things are there", str(len(objects)))]
    if len(objects) == 1:
        found.append(Question("what", "what is it", objects[0].name))
        found.append(Question("category", "which category is it", category(glyphs, objects[0].concept)))
    for one in objects:
        across = {other.name: other.centre[0] - one.centre[0] for other in objects if other is not one}
        if any(abs(distance) < APART * side for distance in across.values()):
            continue
        for where, sign in (("left", -1), ("right", 1)):
            there = [name for name, distance in across.items() if sign * distance > 0]
            if len(there) == 1:
                found.append(Question("side", f"what is {where} of the {one.name}", there[0]))
    return found


def category(glyphs: Glyphs, concept: int) -> str:
    return glyphs.categories[concept].replace("-", " ")


def answer_list(glyphs: Glyphs) -> list[str]:
    """All answers that there can be, in alphabetical order."""
    categories = {category(glyphs, concept) for concept in range(len(glyphs))}
    return sorted({*glyphs.names, *categories, *map(str, range(1, MAX_OBJECTS + 1))})


class BundledQuestions(Dataset):
    """Items of `datasets.tasks.vqa.VQATrainDataset` about freshly drawn scenes in the fonts of training, as many
    questions of each kind as of the others.

    length: questions in an epoch; item n is question n % length of epoch n // length.
    """

    def __init__(self, glyphs: Glyphs, words: Encode, length: int, *, side: int, seed: int):
        if length < 1:
            raise UserError(f"length must be at least 1, got {length!r}")
        self.glyphs, self.words, self.length, self.side, self.seed = glyphs, words, length, side, seed

    def __len__(self) -> int:
        return self.length

    def draw(self, n: int) -> tuple[Scene, Question]:
        """Scene and question of running number n."""
        _, rng = sample_generator(n, self.length, self.seed)
        kind = list(KINDS)[rng.integers(len(KINDS))]
        while True:  # not every scene has things that are clearly apart
            scene = self._scene(kind, rng)
            asked = [q for q in questions_about(scene.objects, self.side, self.glyphs) if q.kind == kind]
            if asked:
                return scene, asked[rng.integers(len(asked))]

    def _scene(self, kind: str, rng: np.random.Generator) -> Scene:
        least, most = KINDS[kind]
        n_objects = int(rng.integers(least, most + 1))
        return draw_scene(self.glyphs, rng, self.glyphs.train_vendors, self.side, n_objects)

    def __getitem__(self, n: int) -> dict[str, Any]:
        scene, question = self.draw(n)
        return {
            "image": image_tensor(scene.image),
            "question": self.words.question(question.text),
            "answers": [self.words.answer(question.answer)],
            "weights": [1.0],
        }
