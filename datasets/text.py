"""Captions to token ids: cleaning, the `[CLS] x` template, and masking for masked language modelling (MLM)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from sparsity.errors import UserError

_DROPPED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_SPECIAL = re.compile(r"\[.+\]")  # [PAD], [MASK], [unused17]: never drawn as a random word
_SIDE = re.compile(r"\b(left|right)")
IGNORED = -100  # label of an unused MLM slot; the ignore_index of cross_entropy


class Tokenizer(Protocol):
    """A tokenizer as a dataset uses it (`models.parts.tokenizer.WordPiece` is one); ids are without special tokens."""

    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def id_to_token(self, i: int) -> str: ...


def clean_caption(text: str, max_words: int) -> str:
    """Lower-case, no punctuation, hyphens and slashes as spaces, `<person>` as person; the first `max_words` words."""
    return clean_question(text, max_words).replace("<person>", "person")


def clean_question(text: str, max_words: int) -> str:
    """As `clean_caption`, but for `<person>`."""
    return " ".join(text.lower().translate(_DROPPED).split()[:max_words])


def mentions_side(text: str) -> bool:
    """Whether a text speaks of left or right, so that its image must not be flipped."""
    return _SIDE.search(text.lower()) is not None


class TextEncoder:
    """Turns one caption into the text fields of a batch, `[CLS] x` padded to `max_tokens`.

    Args:
        tokenizer: see `Tokenizer`.
        max_tokens: length T of the ids, [CLS] (and [SEP]) included; what is longer is cut.
        max_masks: slots for masked tokens, and the most tokens that are masked.
        mask_prob: share of the tokens that is masked (at least one token is).
        ngram_prob: probability that a run of 2 to `max_ngram` words is masked instead of one word.
        max_words: captions are cleaned to this many words; default `max_tokens`.
        add_sep: template `[CLS] x [SEP]` instead of `[CLS] x`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int,
        max_masks: int = 8,
        mask_prob: float = 0.25,
        ngram_prob: float = 0.2,
        max_ngram: int = 3,
        max_words: int | None = None,
        add_sep: bool = False,
    ):
        if max_tokens < 2 + add_sep:
            raise UserError(f"max_tokens must leave room for [CLS] and a word, got {max_tokens!r}")
        if max_masks < 1:
            raise UserError(f"max_masks must be at least 1, got {max_masks!r}")
        if not 0 < mask_prob <= 1:
            raise UserError(f"mask_prob must be a fraction above 0 and at most 1, got {mask_prob!r}")
        if max_ngram < 2:
            raise UserError(f"max_ngram must be at least 2, got {max_ngram!r}")
        self.tokenizer, self.max_tokens, self.max_masks, self.mask_prob = tokenizer, max_tokens, max_masks, mask_prob
        self.ngram_prob, self.max_ngram, self.add_sep = ngram_prob, max_ngram, add_sep
        self.max_words = max_tokens if max_words is None else max_words
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
        self._continues = np.array([token.startswith("##") for token in tokens])
        self._ordinary = np.array([i for i, token in enumerate(tokens) if not _SPECIAL.fullmatch(token)])

    def __call__(self, caption: str, rng: np.random.Generator, masked: bool = True) -> dict[str, torch.Tensor]:
        """Encode one caption.

        Returns int64 tensors `text_ids`, `text_atts` (T,), and with `masked` also `text_ids_masked` (T,), `masked_pos`
        and `masked_ids` (max_masks,), where an unused slot has position 0 and id -100. An empty caption has no mask.
        """
        ids = self._ids(caption)
        fields = {"text_ids": self._padded(ids), "text_atts": self._attention(len(ids))}
        if masked:
            fields |= self._mask(np.array(ids), rng)
        return {name: torch.from_numpy(value) for name, value in fields.items()}

    def plain(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode captions for evaluation: int64 tensors `text_ids` and `text_atts`, each (len(texts), T)."""
        ids = [self._ids(text) for text in texts]
        shape = (len(ids), self.max_tokens)  # given, so that no text at all is (0, T)
        return {
            "text_ids": torch.from_numpy(np.array([self._padded(i) for i in ids], np.int64).reshape(shape)),
            "text_atts": torch.from_numpy(np.array([self._attention(len(i)) for i in ids], np.int64).reshape(shape)),
        }

    def _ids(self, caption: str) -> list[int]:
        ids = self.tokenizer.encode(clean_caption(caption, self.max_words))
        end = [self.tokenizer.sep_id] if self.add_sep else []
        return [self.tokenizer.cls_id, *ids[: self.max_tokens - 1 - len(end)], *end]

    def _padded(self, ids: Sequence[int]) -> np.ndarray:
        padded = np.full(self.max_tokens, self.tokenizer.pad_id, dtype=np.int64)
        padded[: len(ids)] = ids
        return padded

    def _attention(self, length: int) -> np.ndarray:
        return (np.arange(self.max_tokens) < length).astype(np.int64)

    def _mask(self, ids: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """80 % of the chosen tokens become [MASK], 10 % a random token, 10 % stay (Devlin et al., arXiv 1810.04805)."""
        chosen = self._choose(ids, rng)
        draw = rng.random(len(chosen))
        words = rng.choice(self._ordinary, len(chosen))
        masked = self._padded(ids)
        masked[chosen] = np.where(draw < 0.8, self.tokenizer.mask_id, np.where(draw < 0.9, words, ids[chosen]))
        positions = np.zeros(self.max_masks, dtype=np.int64)
        labels = np.full(self.max_masks, IGNORED, dtype=np.int64)
        positions[: len(chosen)], labels[: len(chosen)] = chosen, ids[chosen]
        return {"text_ids_masked": masked, "masked_pos": positions, "masked_ids": labels}

    def _choose(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions to mask, in order: whole words and runs of words, drawn until the share is reached.

        The first word drawn is masked even where it alone exceeds the share (else words of several pieces would never
        be masked in short captions); a later word or run is taken only where it fits.
        """
        stop = len(ids) - self.add_sep
        starts = 1 + np.flatnonzero(~self._continues[ids[1:stop]])
        edges = np.append(starts, stop)  # word w is edges[w] : edges[w + 1]
        budget = min(self.max_masks, max(1, round(len(ids) * self.mask_prob)))
        chosen: set[int] = set()
        for word in rng.permutation(len(starts)):
            if edges[word] in chosen:
                continue
            run = rng.integers(2, self.max_ngram + 1) if rng.random() < self.ngram_prob else 1
            for length in (run, 1):  # a run that does not fit is one word
                span = set(range(edges[word], edges[min(word + length, len(starts))]))
                room = budget if chosen or length > 1 else self.max_masks
                if len(chosen | span) <= room:
                    chosen |= span
                    break
            if len(chosen) >= budget:
                break
        if not chosen and len(starts):  # only words of more pieces than there are slots
            first = edges[rng.integers(len(starts))]
            chosen = set(range(first, first + budget))
        return np.array(sorted(chosen), dtype=np.int64)
