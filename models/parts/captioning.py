"""Captioning: an image encoder, and a causal text decoder that looks at its tokens.

Shapes: B images and texts, L image tokens, T text tokens, D text width, V vision width, N tokens to be predicted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.checkpoint import read_weights
from models.parts.bert import BertForMaskedLM
from models.parts.generation import generate
from models.parts.task_model import TaskModel
from sparsity.errors import UserError
from sparsity.view import Output, Outputs

LABEL_SMOOTHING = 0.1


class Captioner(TaskModel):
    """The base of the captioning models; each adds its image encoder and the `text_decoder`.

    prompt: ids that every caption begins with, which are given when one is written and not learned. end: id of the
    token that ends one.
    """

    text_decoder: BertForMaskedLM

    def __init__(self, prompt: Sequence[int], end: int, pad: int = 0, label_smoothing: float = LABEL_SMOOTHING):
        super().__init__()
        self.prompt, self.end, self.pad, self.label_smoothing = tuple(prompt), end, pad, label_smoothing

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> tokens (B, L, V)."""
        raise NotImplementedError

    def started(self, ids: Tensor) -> Tensor:
        """Ids (B, T) with the first token that this model's texts have; [CLS] as it is."""
        return ids

    def language_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (N, vocab) and the ids (N,) that they should have predicted."""
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def forward(self, batch: dict, epoch: float = 0.0) -> dict[str, Tensor]:
        """The loss of each token after the prompt, [SEP] included: the mean over `text_ids` where `text_atts` is 1."""
        states, learned = self.states(batch)
        logits = self.text_decoder.cls(states[learned])  # (N, vocab): the head is the costly part
        return self._losses(logits, learned, batch)

    def taught(
        self, batch: dict, epoch: float, outputs: Callable[[dict], Outputs]
    ) -> tuple[dict[str, Tensor], Outputs]:
        words = outputs(batch)["words"]
        return self._losses(words.tensor[words.real], words.real, batch), {"words": words}

    def states(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Return the decoder's states (B, T - 1, D) at all but the last token, and where the next token is learned,
        bool (B, T - 1).
        """
        ids, atts = self.started(batch["text_ids"]), batch["text_atts"]
        states = self.text_decoder.bert(ids, atts, self.encode_image(batch["image"]))
        learned = atts[:, 1:].bool()
        learned[:, : len(self.prompt) - 1] = False
        return states[:, :-1], learned

    def _losses(self, logits: Tensor, learned: Tensor, batch: dict) -> dict[str, Tensor]:
        """logits: (N, vocab), of the tokens where `learned`."""
        return {"loss": self.language_loss(logits.float(), batch["text_ids"][:, 1:][learned])}

    def generate(self, image: Tensor, **options: object) -> Tensor:
        """Ids of captions of images (B, 3, H, W), the prompt first; options as `parts.generation.generate` takes."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                prompt = self.started(torch.tensor([self.prompt], device=image.device))
                marks = {"end": self.end, "pad": self.pad}
                return generate(self.text_decoder, self.encode_image(image), prompt, **marks, **options)
        finally:
            self.train(was_training)


def outputs(model: Captioner, batch: dict) -> Outputs:
    """Return the logits (B, T - 1, vocab) of each token that is learned."""
    states, learned = model.states(batch)
    return {"words": Output("logits", model.text_decoder.cls(states), real=learned)}


def check_captioning_weights(path: str | Path) -> None:
    """Raise UserError unless the file is a checkpoint of a captioning model, as captioning_pretrain.py makes one."""
    if not any(name.startswith("text_decoder.bert.") for name in read_weights(path)):
        raise UserError(
            f"{path}: no text decoder in this file, so it is no checkpoint of captioning_pretrain.py; leave "
            "--load_capt_pretrain out for a pretrained model"
        )
