"""Texts to batches of a model of transformers, by its own tokenizer."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from models.external.libraries import Transformers, library_of, takes
from models.hub import first_line, local_only
from sparsity.errors import UserError

IGNORED = -100  # label of tokens that are not predicted
MOST_TOKENS = 2048  # of a row, where nothing is said
MASKED = 0.15  # share of the tokens that a model of masked words predicts, as BERT was trained
OWN_LOADER = "give --calibration package.module:loader, a function of yours that returns the batches"


class Texts:
    """Texts one behind the other, each ended by the tokenizer's token for that, cut into rows of `max_tokens`; the last
    row is shorter. What the model predicts depends on its kind: the next word, the masked ones, or (with an encoder and
    a decoder) the row itself.

    max_tokens: default, as many as the model takes, at most `MOST_TOKENS`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int | None = None):
        self.tokenizer, config = tokenizer, model.config.get_text_config()
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end
        self.padding = 0 if padding is None else padding
        most = [tokenizer.model_max_length, config.to_dict().get("max_position_embeddings")]
        self.most = min(each for each in most if each)
        self.max_tokens = max_tokens or min(MOST_TOKENS, self.most)
        if self.max_tokens > self.most:
            raise UserError(f"--max_tokens {max_tokens}: the model takes at most {self.most}")
        predicts = model.get_output_embeddings() is not None and takes(model, "labels")
        self.masks = predicts and type(model).__name__.endswith("MaskedLM")
        self.predicts, self.decoder = predicts, config.is_encoder_decoder

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each row."""
        found = self.tokenizer(list(texts))["input_ids"]
        ends = [] if self.end is None else [self.end]
        ids = list(chain.from_iterable(row if row[-1:] == ends else [*row, *ends] for row in found))
        return [ids[first : first + self.max_tokens] for first in range(0, len(ids), self.max_tokens)]

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the batch of these rows, (B, T), the shorter ones padded to the right."""
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.padding] * (length - len(row))] for row in rows])  # (B, T)
        real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        batch = {"input_ids": ids, "attention_mask": real}
        if not self.predicts:
            return batch
        labels = ids.masked_fill(real == 0, IGNORED)
        return batch | (self._masked(ids, labels) if self.masks else {"labels": labels})

    def _masked(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the ids with some hidden, the same at each reading, and the labels of those alone."""
        drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(int(ids.sum())))
        hidden = (drawn < MASKED) & (labels != IGNORED)
        masked = ids.masked_fill(hidden, self.tokenizer.mask_token_id)
        return {"input_ids": masked, "labels": labels.masked_fill(~hidden, IGNORED)}


def packing(model: nn.Module, max_tokens: int | None = None) -> Texts:
    """Return what makes batches of texts for a model; UserError where it has no tokenizer, or reads more than texts."""
    if not isinstance(library_of(model), Transformers):
        raise UserError(f"--calibration: only models of transformers have a tokenizer for texts; {OWN_LOADER}")
    if model.main_input_name != "input_ids":
        raise UserError(
            f"--calibration: {type(model).__name__} reads {model.main_input_name}, no text alone: give a folder of them"
        )
    if model.get_output_embeddings() is None and takes(model, "pixel_values"):
        raise UserError(f"--calibration: {type(model).__name__} compares texts with images: give a folder of images")
    return Texts(model, load_tokenizer(model.name_or_path), max_tokens)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer that belongs to a model of transformers; UserError where it is not to be had."""
    import transformers

    try:
        options = {"trust_remote_code": False, "local_files_only": local_only(name)}
        return transformers.AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # whatever a missing or foreign file makes of it
        raise UserError(f"--calibration: {name!r} has no tokenizer: {first_line(error)}; {OWN_LOADER}") from error
