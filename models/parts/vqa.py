"""Visual question answering: a decoder that writes answers to the states of a question, its loss, and the choice from a
closed list.

Shapes: Q questions, T their tokens, K answers, A their tokens, L image tokens, V vision width, D text width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import load_weights
from models.parts.bert import Bert, BertForMaskedLM
from models.parts.similarity import head
from models.parts.task_model import TaskModel
from sparsity.errors import UserError, listed
from sparsity.view import Output, Outputs

ROWS = 2048  # answers that are scored together
_HEAD = "text_decoder.cls.predictions.decoder.weight"  # tied to the decoder's word embeddings


class Answering(TaskModel):
    """Adds what the models share to their `encode_image` and `ask`.

    text_encoder: reads the question with the image. text_decoder: attends to its states. inherit_mask: the decoder has
    the masks of the layers that it begins as. label_smoothing: of the language model's loss.
    """

    label_smoothing = 0.0
    text_encoder: Bert
    text_decoder: BertForMaskedLM

    def __init__(self, config: Any, inherit_mask: bool):
        super().__init__()
        self.config, self.inherit_mask = config, inherit_mask

    def encode_image(self, image: Tensor) -> Tensor:
        """(Q, 3, H, W) -> tokens (Q, L, V)."""
        raise NotImplementedError

    def ask(self, image: Tensor, ids: Tensor, atts: Tensor) -> Tensor:
        """Image tokens (Q, L, V), ids and padding mask of the questions (Q, T) -> their states (Q, T, D)."""
        raise NotImplementedError

    def begun(self, answer_ids: Tensor) -> Tensor:
        """Ids (K, A) as the decoder begins them."""
        return answer_ids

    def score(self, first: Tensor, losses: Tensor) -> Tensor:
        """Return what an answer is ranked by, from log p of its first token and its loss, all (Q, k)."""
        raise NotImplementedError

    def copies(self) -> dict[str, str]:
        """Parameter of the decoder -> the one of the text encoder that it begins as, by their names."""
        raise NotImplementedError

    def heirs(self, name: str) -> tuple[str, ...]:
        return tuple(heir for heir, source in self.copies().items() if source == name) if self.inherit_mask else ()

    @torch.no_grad()
    def begin_decoder(self) -> None:
        """Copy what it begins as; UserError where the widths differ."""
        vision, text = self.config.vision.width, self.config.text.width
        if vision != text:
            raise UserError(
                f"vision.width {vision} and text.width {text} must be equal: the decoder attends to text with the "
                "weights that attend to the image in the pretrained model"
            )
        for name, source in self.copies().items():
            self.get_parameter(name).copy_(self.get_parameter(source))

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """Return the loss of `image`, `text_ids`, `text_atts` (Q, T), the answers `answer_ids`, `answer_atts` (K, A),
        their `answer_weights` (K,) and numbers `answer_owner` (K,) of the questions: sum of weight x loss, over Q.
        """
        return self._losses(self.predicted(batch), batch)

    def taught(
        self, batch: dict[str, Any], epoch: float, outputs: Callable[[dict[str, Any]], Outputs]
    ) -> tuple[dict[str, Tensor], Outputs]:
        logits = self.predicted(batch)
        return self._losses(logits, batch), by_question(logits, batch)

    def predicted(self, batch: dict[str, Any]) -> Tensor:
        """Return the logits (N, vocab) of all tokens of the answers but the first of each, one answer after the other;
        `batch` as `forward` takes it.
        """
        owner, atts = batch["answer_owner"], batch["text_atts"]
        states = self.ask(self.encode_image(batch["image"]), batch["text_ids"], atts)
        return self._predict(batch["answer_ids"], batch["answer_atts"], states[owner], atts[owner])

    def _losses(self, logits: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        losses = self._summed(logits, batch["answer_ids"], batch["answer_atts"])
        return {"loss": (batch["answer_weights"] * losses).sum() / len(batch["text_ids"])}

    def answer_losses(self, ids: Tensor, atts: Tensor, states: Tensor, state_atts: Tensor) -> Tensor:
        """Cross-entropy of each answer, the sum over its tokens after the first: (K,).

        ids, atts: (K, A). states, state_atts: of its question, (K, T, D) and (K, T); or of a question for each K / Q
        answers one after the other, (Q, T, D) and (Q, T).
        """
        return self._summed(self._predict(ids, atts, states, state_atts), ids, atts)

    def _predict(self, ids: Tensor, atts: Tensor, states: Tensor, state_atts: Tensor) -> Tensor:
        """Logits (N, vocab) of the real tokens after the first: the vocabulary is large, padding is not predicted."""
        hidden = self.text_decoder.bert(self.begun(ids), atts, states, state_atts)[:, :-1]
        return self.logits(hidden[atts[:, 1:].bool()])

    def _summed(self, logits: Tensor, ids: Tensor, atts: Tensor) -> Tensor:
        """Return what `answer_losses` returns, from the logits of `_predict`."""
        real = atts[:, 1:].bool()
        losses = F.cross_entropy(logits, ids[:, 1:][real], label_smoothing=self.label_smoothing, reduction="none")
        return losses.new_zeros(real.shape).masked_scatter(real, losses).sum(1)

    def first_tokens(self, states: Tensor, state_atts: Tensor, ids: Tensor) -> Tensor:
        """log p (Q, N) of the first token, after the one that all begin with, of N answers (N, A)."""
        start = self.begun(ids[:1, :1]).expand(len(states), 1)
        hidden = self.text_decoder.bert(start, torch.ones_like(start), states, state_atts)
        return self.logits(hidden[:, 0]).log_softmax(1)[:, ids[:, 1]]

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (N, vocab) in float32. In evaluation, where answers are ranked, autocast rounds none."""
        return self.text_decoder.cls(hidden).float() if self.training else head(self.text_decoder.cls, hidden).float()

    @torch.no_grad()
    def rank(self, states: Tensor, state_atts: Tensor, ids: Tensor, atts: Tensor, k_test: int) -> Tensor:
        """Number (Q,) of the best of N answers (N, A) to each question (Q, T, D).

        The `k_test` whose first token is the most probable are scored, of equal ones those that stand first. A batch of
        them holds whole questions, so that their states are neither repeated nor projected again for each answer.
        """
        first = self.first_tokens(states, state_atts, ids)
        kept = first.sort(dim=1, descending=True, stable=True).indices[:, :k_test]  # (Q, k)
        best = []
        for rows in torch.arange(len(states), device=states.device).split(max(1, ROWS // kept.shape[1])):
            chosen = kept[rows].flatten()
            longest = int(atts[chosen].sum(1).max())
            answers = ids[chosen, :longest], atts[chosen, :longest]
            losses = self.answer_losses(*answers, states[rows], state_atts[rows]).view(len(rows), -1)
            best.append(self.score(first[rows].gather(1, kept[rows]), losses).argmax(1))
        return kept.gather(1, torch.cat(best)[:, None]).squeeze(1)


def outputs(model: Answering, batch: dict[str, Any]) -> Outputs:
    """Return the logits of each question's answers, token after token."""
    return by_question(model.predicted(batch), batch)


def by_question(logits: Tensor, batch: dict[str, Any]) -> Outputs:
    """Return logits (N, vocab) of answers' tokens, see `Answering.predicted`, as those of their questions: (Q, most
    tokens of a question, vocab), so that each question counts once, however many answers it has.
    """
    real = batch["answer_atts"][:, 1:].bool()  # (K, A - 1)
    owner = batch["answer_owner"][:, None].expand_as(real)[real]  # (N,)
    counts = owner.bincount(minlength=len(batch["text_ids"]))
    order = owner.argsort(stable=True)
    first = counts.cumsum(0) - counts  # of each question, in that order
    place = torch.arange(len(owner), device=owner.device) - first[owner[order]]
    shape = len(counts), int(counts.max())
    padded = logits.new_zeros(*shape, logits.shape[1]).index_put((owner[order], place), logits[order])
    told = torch.arange(shape[1], device=owner.device) < counts[:, None]
    return {"answers": Output("logits", padded, real=told)}


def load(model: Answering, weights: str | Path, **options: Any) -> Answering:
    """The weights of a file into a model, and copies where the file has nothing for what the decoder begins as a copy.

    options: of `load_weights`. Raises UserError as that does, or where the decoder cannot begin as a copy.
    """
    copies = model.copies()
    left_out = load_weights(model, weights, optional=(*copies, _HEAD), **options)
    missing = [name for name in left_out if name in copies]
    if missing and len(missing) < len(copies):
        raise UserError(f"{weights}: weights of another model: {len(missing)} missing: {listed(missing, 3)}")
    if missing:
        model.begin_decoder()
    return model
