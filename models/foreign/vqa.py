"""Models of transformers that write about images (BLIP-2, LLaVA and their kin, BLIP) fine-tuned for visual question
answering: they write the answers in words.

Shapes: B questions, T their tokens, A tokens of an answer.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.external.preprocessing import PREFIXED
from models.external.texts import IGNORED
from models.foreign.task_model import NEW as NEW
from models.foreign.task_model import prunable_view as prunable_view
from models.foreign.task_model import save as save
from models.foreign.task_model import task_names as task_names
from models.foreign.transformers_model import Asked, loaded, processor_of
from models.foreign.writing import Questions, Writer, Writing, check_writes, padded, writing_of
from sparsity.errors import UserError

PLAIN = "Question: {} Answer:"  # how models without a chat template are asked, as BLIP-2 is published
PREFIX = "answer en {}"  # how PaliGemma is, as it is published
MOST_TOKENS = 32  # of an answer, where nothing is said


class AskedAnswers(Asked, Protocol):
    """The part of a configuration that is read here, see `configs.foreign.ForeignVQAConfig`."""

    max_tokens: int | None
    wording: str | None


class BlipAnswers(Writing):
    """BLIP's own: an encoder reads the question with the image, and a decoder of its own the answer, which begins and
    ends with tokens of its own, as in its published code.
    """

    def __init__(self, model: nn.Module, processor: Any, max_tokens: int):
        super().__init__(model, processor, max_tokens)
        text = model.config.text_config
        self.begin, self.end, self.pad = text.bos_token_id, text.sep_token_id, text.pad_token_id

    def asked(self, images: Sequence[Any], questions: Sequence[str]) -> dict[str, Tensor]:
        return dict(self.processor(images=list(images), text=list(questions), padding=True, return_tensors="pt"))

    def answered(self, images: Sequence[Any], questions: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        """Return the batch of questions with answers: "labels" and "decoder_input_ids" (B, A) are the same but for
        padding, since the model shifts the labels itself.
        """
        rows = [torch.tensor([self.begin, *self.answer(answer, "")]) for answer in answers]
        labels, real = padded(rows, IGNORED), padded([torch.ones_like(row) for row in rows], 0)
        decoder = {"decoder_input_ids": padded(rows, self.pad), "decoder_attention_mask": real}
        return self.asked(images, questions) | decoder | {"labels": labels}


class BlipAnswerer(Writer):
    def _generate(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """Questions of one length at a time: versions of transformers have the decoder read their padding."""
        lengths, rows = batch["attention_mask"].sum(1), {}
        for length in lengths.unique().tolist():
            own = (lengths == length).nonzero().flatten()
            alike = {name: field[own] for name, field in batch.items()}
            alike |= {name: alike[name][:, :length] for name in ("input_ids", "attention_mask")}
            written = self.model.generate(**alike, do_sample=False, **options)[:, 1:]  # after the token that begins it
            rows |= dict(zip(own.tolist(), written, strict=True))
        return padded([rows[row] for row in range(len(lengths))], self.writing.pad)


def build(name: str, config: AskedAnswers) -> Writer:
    """Return the model that --model names, in float32, and how it is asked, under `questions`.

    Raises UserError for a model or weights that are not to be had, and for one that does not write about images.
    """
    model = loaded(name, config)
    check_writes(model, name, "vqa")
    kind = type(model).__name__
    if model.config.model_type == "blip" and not kind.endswith("QuestionAnswering"):
        raise UserError(f"--model {name}: {kind} writes captions: give a BlipForQuestionAnswering")
    processor, most = processor_of(model), config.max_tokens or MOST_TOKENS
    if model.config.model_type == "blip":
        writer, usual = BlipAnswerer(model, name, processor, BlipAnswers(model, processor, most)), "{}"
    else:
        writer = Writer(model, name, processor, writing_of(model, processor, most))
        usual = PREFIX if model.config.model_type in PREFIXED else "{}" if processor.chat_template else PLAIN
    writer.questions = Questions(writer.writing, wording=config.wording or usual)
    return writer
