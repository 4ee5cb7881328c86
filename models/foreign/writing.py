"""Models of transformers that write about an image, asked something in words: BLIP-2, LLaVA and their kin, BLIP.

A text is trained on as it is written: after the question in the model's own chat template, or as plain words where it
has none, follow the tokens of the answer and the one that ends it. The loss is the model's own, of the answer alone;
question and image are given.

Shapes: B images, T tokens of question and answer, A of the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.external.libraries import library_of, takes
from models.external.preprocessing import PREFIXED, Generative
from models.external.texts import IGNORED
from models.foreign.transformers_model import TransformersTask, stacked
from sparsity.errors import UserError


class Writing:
    """Questions about images, and their answers, to batches of one model.

    max_tokens: of an answer with its end; what is longer is cut, and has none.
    """

    answer_type = 0  # of an answer's tokens, where a model has `token_type_ids`

    def __init__(self, model: nn.Module, processor: Any, max_tokens: int):
        self.processor, self.tokenizer, self.max_tokens = processor, processor.tokenizer, max_tokens
        self.preprocess, self.end = Generative(model, processor), end_of(model, processor.tokenizer)
        self.pad = self.tokenizer.pad_token_id  # which `Generative` sees to
        self.encoder_decoder = self.preprocess.encoder_decoder

    def asked(self, images: Sequence[Any], questions: Sequence[str]) -> dict[str, Tensor]:
        """Return the batch in which the questions end where the answers begin: padded to the left."""
        fields, rows = self._questions(images, questions)
        if self.encoder_decoder:
            return fields
        return fields | self._padded(fields, rows, [[]] * len(rows), left=True)

    def answered(self, images: Sequence[Any], questions: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        """Return the batch of questions with answers, and under "labels" the ids of the answers, -100 elsewhere."""
        fields, rows = self._questions(images, questions)
        texts = [self.preprocess.asked(question) for question in questions]
        ids = [self.answer(answer, after) for answer, after in zip(answers, texts, strict=True)]
        if self.encoder_decoder:
            return fields | self._decoded(ids)
        return fields | self._padded(fields, rows, ids, left=False)

    def answer(self, text: str, after: str) -> list[int]:
        """Return the ids of an answer and of its end. after: the text that it follows."""
        space = "" if not after or after[-1].isspace() else " "
        before, both = (self._ids(words) for words in (after[-1:], f"{after[-1:]}{space}{text}"))
        own = both[len(before) :] if both[: len(before)] == before else self._ids(f"{space}{text}")
        return [*own, self.end][: self.max_tokens]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _questions(self, images: Sequence[Any], questions: Sequence[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the fields of questions that the processor makes, and the places of the real tokens of each."""
        texts = [self.preprocess.asked(question) for question in questions]
        fields = dict(self.processor(images=list(images), text=texts, padding=True, return_tensors="pt"))
        rows = []
        for ids, real in zip(fields["input_ids"], fields["attention_mask"], strict=True):
            places = real.nonzero().flatten()
            closed = len(places) > 1 and int(ids[places[-1]]) in (self.end, self.tokenizer.sep_token_id)
            rows.append(places[:-1] if closed and not self.processor.chat_template else places)
        return fields, rows

    def _padded(
        self, fields: Mapping[str, Tensor], places: Sequence[Tensor], answers: Sequence[Sequence[int]], *, left: bool
    ) -> dict[str, Tensor]:
        """Return the fields with one number a token: questions, answers behind them, and padding on one side."""
        shape, after = fields["input_ids"].shape, [torch.tensor(ids, dtype=torch.long) for ids in answers]
        tokens = {name: field for name, field in fields.items() if field.shape == shape}
        found, kinds = {}, {"attention_mask": 1, "token_type_ids": self.answer_type}
        for name, field in tokens.items():
            rest = after if name == "input_ids" else [torch.full_like(ids, kinds.get(name, 0)) for ids in after]
            rows = [torch.cat([row[own], ids]) for row, own, ids in zip(field, places, rest, strict=True)]
            found[name] = padded(rows, self.pad if name == "input_ids" else 0, left)
        if not left:
            rows = [torch.cat([torch.full_like(own, IGNORED), ids]) for own, ids in zip(places, after, strict=True)]
            found["labels"] = padded(rows, IGNORED, left)
        return found

    def _decoded(self, answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return what a decoder beside an encoder reads and writes, each (B, A)."""
        labels = padded([torch.tensor(ids) for ids in answers], IGNORED, left=False)
        real = (labels != IGNORED).long()
        shifted = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)  # it reads what it has written
        return {"labels": labels, "decoder_attention_mask": shifted}


class PrefixWriting(Writing):
    """PaliGemma's (arXiv 2407.07726, section 3.1): image and question, which a newline ends, see each other both ways,
    and an answer sees what stands before it. Its `token_type_ids` say which is which: 0 and 1, as its processor has it.
    """

    answer_type = 1

    def answer(self, text: str, after: str) -> list[int]:
        """Return the ids of an answer and of its end: nothing joins it to the question."""
        return [*self._ids(text), self.end][: self.max_tokens]

    def _questions(self, images: Sequence[Any], questions: Sequence[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        made, rows = super()._questions(images, questions)
        fields = {"token_type_ids": torch.zeros_like(made["input_ids"]), **made}
        return {name: field for name, field in fields.items() if name != "labels"}, rows  # which are none


def writing_of(model: nn.Module, processor: Any, max_tokens: int) -> Writing:
    """Return what makes the batches of a model, BLIP's apart."""
    kind = PrefixWriting if model.config.model_type in PREFIXED else Writing
    return kind(model, processor, max_tokens)


class Writer(TransformersTask):
    """A model that is asked about images and writes answers. writing: makes its batches. questions: of items."""

    questions: "Questions"

    def __init__(self, model: nn.Module, source: str, processor: Any, writing: Writing):
        super().__init__(model, source)
        self.processor, self.writing = processor, writing

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """The model's own loss of the tokens of the answers, as `Writing.answered` makes the batch."""
        return {"loss": library_of(self.model).loss(batch)}

    def library_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    @torch.no_grad()
    def generate(self, batch: dict[str, Tensor], *, max_length: int, **options: Any) -> Tensor:
        """Write answers to the questions of a batch, as `Writing.asked` makes it, of at most `max_length` tokens.

        Returns ids + 1 of the tokens, (B, A); 0 where there are none. options: of transformers' `generate`.
        """
        was_training = self.training
        self.eval()
        try:
            written = self._generate(batch, max_new_tokens=max_length, **options)
        finally:
            self.train(was_training)
        ends = (written == self.writing.end).long().cumsum(1) > 0  # what follows the end, and the end, is none
        return (written + 1).masked_fill(ends | (written == self.writing.pad), 0)[:, :max_length]

    def _generate(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        marks = {"eos_token_id": self.writing.end, "pad_token_id": self.writing.pad, "do_sample": False}
        found = self.model.generate(**batch, **marks, **options)
        if self.writing.encoder_decoder:
            return found[:, 1:]  # after what a decoder starts with
        return after_question(found, batch["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a row of `generate`."""
        return self.processor.tokenizer.decode([i - 1 for i in ids if i > 0], skip_special_tokens=True).strip()


class Questions:
    """Items with an RGB "image" and what is asked about it, to batches.

    question: of items that ask nothing. wording: in whose {} a question stands.
    """

    def __init__(self, writing: Writing, question: str = "", wording: str = "{}"):
        self.writing, self.question, self.wording = writing, question, wording

    def answered(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch to train on: {"image", "question", "answer"} or {"image", "caption"} of each item."""
        answers = [item["answer"] if "answer" in item else item["caption"] for item in items]
        return self.writing.answered([item["image"] for item in items], self._asked(items), answers)

    def asked(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch to be answered: {"image", "index"} and perhaps "question" of each item."""
        fields = self.writing.asked([item["image"] for item in items], self._asked(items))
        return {"image": fields, **stacked(items, "index")}

    def _asked(self, items: Sequence[dict[str, Any]]) -> list[str]:
        return [self.wording.replace("{}", item.get("question", self.question)) for item in items]


def after_question(written: Tensor, question: Tensor) -> Tensor:
    """Return the new tokens of what a model has written, which in some versions begins with the question."""
    length = question.shape[1]
    repeats = written.shape[1] >= length and bool((written[:, :length] == question).all())
    return written[:, length:] if repeats else written


def end_of(model: nn.Module, tokenizer: Any) -> int:
    """Return the id that ends what a model writes: the tokenizer's where the model stops at it, else the model's."""
    known = model.generation_config.eos_token_id
    if known is None:
        known = model.config.get_text_config(decoder=True).to_dict().get("eos_token_id")
    stops = [known] if isinstance(known, int) else list(known or ())
    own = tokenizer.eos_token_id
    if own is not None and (own in stops or not stops):
        return own
    if not stops:
        raise UserError(f"--model hf:{model.name_or_path}: neither model nor tokenizer say what ends a text")
    return stops[0]


def check_writes(model: nn.Module, name: str, task: str) -> None:
    """Raise UserError unless this is a model that writes about images."""
    if not (model.can_generate() and takes(model, "pixel_values") and takes(model, "labels")):
        raise UserError(
            f"--model {name}: {type(model).__name__} does not write about images: {task} needs a model such as BLIP-2, "
            "LLaVA or BLIP"
        )


def padded(rows: Sequence[Tensor], value: int, left: bool = False) -> Tensor:
    """Stack rows of different length, padded on one side."""
    if not left:
        return pad_sequence(list(rows), batch_first=True, padding_value=value)
    return pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=value).flip(1)
