"""Questions about images answered by a model, from a closed list or in its own words, and how right its answers are."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from datasets.calibration.data_kinds import skipped_path
from datasets.collate import SkippedImages
from datasets.tasks.own_questions import OwnAsked
from datasets.tasks.vqa import Questions
from datasets.tasks.vqa_accuracy import Asked, accuracies, exact_match
from engine.evaluation.watched import watched
from engine.evaluation.written import Written
from engine.ranks import on_leader, summed
from sparsity.files import write_atomic


class Answers:
    """Accuracies of a model in per cent, as it is when this is called; the ranks share the images.

    model: has `encode_image`, `ask` and `rank`, see models/parts/vqa.py. answers: what there is to choose from. k_test:
    so many are scored for each question. batch_size: images at a time. path: where the answers are written, as the
    server of the challenge takes them. Images that cannot be read are listed in `folder` and their questions answered
    with ""; more than `max_skipped` of them is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: Questions,
        answers: Sequence[str],
        fabric: Any,
        folder: Path,
        *,
        k_test: int,
        batch_size: int,
        path: Path | None = None,
        workers: int = 0,
        max_skipped: float = 0.01,
    ):
        self.model, self.asked, self.answers, self.fabric = model, questions.asked, tuple(answers), fabric
        self.k_test, self.path, words = k_test, path, questions.words
        self.encoded = words.padded("answer", [words.answer(answer) for answer in answers])
        own = Subset(questions, range(fabric.global_rank, len(questions), fabric.world_size))
        self.batches = DataLoader(own, batch_size, num_workers=workers, collate_fn=words.gather_asked)
        self.skipped = SkippedImages(skipped_path(folder, fabric.global_rank), max(1, len(own)), max_skipped)

    def __call__(self) -> dict[str, float]:
        given = ["" if number < 0 else self.answers[number] for number in self.choose().tolist()]
        if self.path and self.fabric.is_global_zero:
            _write(self.path, self.asked, given)
        return accuracies(self.asked, given)

    @torch.no_grad()
    def choose(self) -> Tensor:
        """Number of the answer to each question, -1 where its image cannot be read: the same on all ranks."""
        was_training = self.model.training
        self.model.eval()
        chosen = torch.zeros(len(self.asked), dtype=torch.long)  # of each rank's questions, from 1
        encoded = {name: tensor.to(self.fabric.device) for name, tensor in self.encoded.items()}
        try:
            for batch in watched(self.batches, self.skipped, self.fabric, "questions"):
                chosen[batch["number"]] = 1 + self._rank(batch, encoded).cpu()
        finally:
            self.model.train(was_training)
        return summed(self.fabric, chosen) - 1

    def _rank(self, batch: Mapping[str, Any], encoded: Mapping[str, Tensor]) -> Tensor:
        batch = self.fabric.to_device(batch)
        image = self.model.encode_image(batch["image"])[batch["image_of"]]
        states = self.model.ask(image, batch["text_ids"], batch["text_atts"])
        return self.model.rank(states, batch["text_atts"], encoded["answer_ids"], encoded["answer_atts"], self.k_test)


class WrittenAnswers(Written):
    """Accuracies of the answers that a model writes, in per cent, as it is when this is called: by the rules of the VQA
    challenge, and the share of exact matches. path: where the answers are written. options: of `Written`.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: OwnAsked,
        decode: Callable[[list[int]], str],
        fabric: Any,
        folder: Path,
        *,
        path: Path | None = None,
        **options: Any,
    ):
        super().__init__(model, questions, decode, fabric, folder, **options)
        self.asked, self.path = questions.asked, path

    def __call__(self) -> dict[str, float]:
        given = self.texts()
        if self.path:
            on_leader(self.fabric, partial(_write, self.path, self.asked, given))
        return accuracies(self.asked, given) | {"exact_match": exact_match(self.asked, given)}


def _write(path: Path, asked: Sequence[Asked], given: Sequence[str]) -> None:
    pairs = zip(asked, given, strict=True)
    content = [{"question_id": question.question_id, "answer": answer} for question, answer in pairs]
    write_atomic(path, json.dumps(content).encode())
