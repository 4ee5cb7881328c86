"""Models of transformers that write about images (BLIP-2, LLaVA and their kin, BLIP) fine-tuned for captioning."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.external.preprocessing import PREFIXED, PROMPT
from models.foreign.task_model import NEW as NEW
from models.foreign.task_model import prunable_view as prunable_view
from models.foreign.task_model import save as save
from models.foreign.task_model import task_names as task_names
from models.foreign.transformers_model import Asked, loaded, processor_of
from models.foreign.writing import Questions, Writer, Writing, after_question, check_writes, writing_of

BEGUN = "a picture of"  # what models that are asked nothing go on from
PREFIX = "caption en"  # what PaliGemma is asked, as it is published


class AskedCaptions(Asked, Protocol):
    """The part of a configuration that is read here, see `configs.foreign.ForeignCaptioningConfig`."""

    max_tokens: int | None
    question: str | None


MOST_TOKENS = 128  # of a caption, where nothing is said


class BlipWriting(Writing):
    """BLIP's own: what is written begins with a token of its own in place of the tokenizer's first, as in its published
    code, and ends with [SEP].
    """

    def __init__(self, model: nn.Module, processor: Any, max_tokens: int):
        super().__init__(model, processor, max_tokens)
        text = model.config.text_config
        self.begin, self.end = text.bos_token_id, text.sep_token_id

    def _padded(self, fields: Any, places: Any, answers: Any, *, left: bool) -> dict[str, Tensor]:
        ids = fields["input_ids"].clone()
        for row, own in zip(ids, places, strict=True):
            row[own[0]] = self.begin
        return super()._padded({**fields, "input_ids": ids}, places, answers, left=left)


class BlipWriter(Writer):
    def _generate(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        ids, real = batch["input_ids"], batch["attention_mask"]
        # Its `generate` leaves the last token out, which it takes for the tokenizer's [SEP].
        closed = {"input_ids": torch.cat([ids, ids[:, -1:]], 1), "attention_mask": torch.cat([real, real[:, -1:]], 1)}
        return after_question(self.model.generate(**{**batch, **closed}, do_sample=False, **options), ids)


def build(name: str, config: AskedCaptions) -> Writer:
    """Return the model that --model names, in float32, and what it is asked, under `questions`.

    Raises UserError for a model or weights that are not to be had, and for one that does not write about images.
    """
    model = loaded(name, config)
    check_writes(model, name, "captioning")
    processor, most = processor_of(model), config.max_tokens or MOST_TOKENS
    if model.config.model_type == "blip":
        writer = BlipWriter(model, name, processor, BlipWriting(model, processor, most))
    else:
        writer = Writer(model, name, processor, writing_of(model, processor, most))
    usual = PREFIX if model.config.model_type in PREFIXED else PROMPT if processor.chat_template else BEGUN
    writer.questions = Questions(writer.writing, usual if config.question is None else config.question)
    return writer
