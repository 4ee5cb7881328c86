"""Models of transformers with two towers fine-tuned for image-text retrieval, each by the loss that its kind is trained
with: CLIP's softmax over the captions of a batch and over its images (Radford et al., arXiv 2103.00020, figure 3),
SigLIP's sigmoid of each pair (Zhai et al., arXiv 2303.15343, algorithm 1).

Shapes: B pairs of this rank, P of all ranks, E embedding width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.external.libraries import takes
from models.external.preprocessing import Pairs
from models.foreign.task_model import NEW as NEW
from models.foreign.task_model import prunable_view as prunable_view
from models.foreign.task_model import save as save
from models.foreign.task_model import task_names as task_names
from models.foreign.transformers_model import Asked, TransformersTask, loaded, processor_of, stacked
from models.parts.losses import contrastive_loss, gather_features
from models.parts.similarity import normalised, similarity, without_autocast
from sparsity.errors import UserError

SCALE, BIAS = "logit_scale", "logit_bias"  # parameters of the loss; SigLIP's has both
MOST = math.log(100)  # of CLIP's scale, "to prevent scaling the logits by more than 100"
TEXTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # fields of a batch that the text tower reads
NUMBERS = "sample_ids"  # of the images: equal ones are no negatives of each other


class PairBatches:
    """Items with an RGB "image", its "caption" and numbers to batches, as the model's own preprocessing makes them."""

    def __init__(self, preprocess: Pairs):
        self.preprocess, self.texts = preprocess, preprocess.texts

    def pairs(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch to train on: {"image", "caption", "sample_ids"} of each item."""
        texts = self.texts([item["caption"] for item in items])
        return self.preprocess.images([item["image"] for item in items]) | texts | stacked(items, NUMBERS)

    def images(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of images alone: {"image", "index"} of each item."""
        return self.preprocess.images([item["image"] for item in items]) | stacked(items, "index")


class TwoTowers(TransformersTask):
    """A model of transformers with `get_image_features`, `get_text_features` and a learned scale of its logits.

    batches: of what it takes.
    """

    def __init__(self, model: nn.Module, source: str):
        super().__init__(model, source)
        self.processor = processor_of(model)
        self.batches = PairBatches(Pairs(model, self.processor))

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """The contrastive loss of the pairs of all ranks: a batch has the fields of images and texts, each (B, ...),
        and, where several captions are of one image, `sample_ids` (B,).
        """
        ids = batch.get(NUMBERS)
        image, text = gather_features(self.encode_images(batch)), gather_features(self.encode_texts(batch))
        return {"loss": self.contrast(image, text, None if ids is None else gather_features(ids))}

    def encode_images(self, batch: dict[str, Any]) -> Tensor:
        """Features (B, E) of images, l2-normalised, in float32."""
        fields = {name: value for name, value in batch.items() if name not in (*TEXTS, NUMBERS)}
        return normalised(_pooled(self.model.get_image_features(**fields)))

    def encode_texts(self, batch: dict[str, Any]) -> Tensor:
        """Features (B, E) of texts, l2-normalised, in float32."""
        return normalised(_pooled(self.model.get_text_features(**{n: batch[n] for n in TEXTS if n in batch})))

    def contrast(self, image: Tensor, text: Tensor, ids: Tensor | None) -> Tensor:
        """The loss of features (P, E); pairs of equal `ids` (P,) match each other."""
        scale = self.model.logit_scale
        if BIAS not in self.model._parameters:
            return contrastive_loss(image, text, torch.exp(-scale), ids)
        logits = similarity(text, image, torch.exp(-scale)) + self.model.logit_bias
        ids = torch.arange(len(logits), device=logits.device) if ids is None else ids
        sign = (ids[:, None] == ids[None, :]).to(logits.dtype) * 2 - 1  # z: 1 where a pair matches, else -1
        with without_autocast(logits.device):
            return -F.logsigmoid(sign * logits).sum(1).mean()

    def library_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name != NUMBERS} | {"return_loss": True}

    def on_step(self) -> None:
        """Keep the scale of CLIP's logits where CLIP keeps it; SigLIP's is free."""
        if BIAS not in self.model._parameters:
            self.model.logit_scale.data.clamp_(max=MOST)


def build(name: str, config: Asked) -> TwoTowers:
    """Return the model that --model names, in float32.

    Raises UserError for a model or weights that are not to be had, and for one that does not compare images and texts
    by a loss that is known here.
    """
    model = loaded(name, config)
    if SCALE not in model._parameters or not takes(model, "return_loss"):
        raise UserError(
            f"--model {name}: {type(model).__name__} has no contrastive loss with a learned scale: retrieval needs a "
            "model with two towers, such as CLIP or SigLIP"
        )
    return TwoTowers(model, name)


def _pooled(features: Any) -> Tensor:
    """The features in what a tower returns: a tensor, or, in newer versions, an output that has them."""
    return features if isinstance(features, Tensor) else features.pooler_output
