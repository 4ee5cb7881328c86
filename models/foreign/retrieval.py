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

from models.external.preprocessing import Pairs
from models.foreign.task_model import ForeignTaskModel
from models.parts.losses import contrastive_loss, gather_features
from models.parts.similarity import normalised, similarity, without_autocast
from sparsity.errors import UserError

SCALE, BIAS = "logit_scale", "logit_bias"  # parameters of the loss; SigLIP's has both
MOST = math.log(100)  # of CLIP's scale, "to prevent scaling the logits by more than 100"
TEXTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # fields of a batch that the text tower reads
NUMBERS = "sample_ids"  # of the images: equal ones are no negatives of each other


class TwoTowers(ForeignTaskModel):
    """A model of transformers with `get_image_features`, `get_text_features` and a learned scale of its logits."""

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

    def on_step(self) -> None:
        """Keep the scale of CLIP's logits where CLIP keeps it; SigLIP's is free."""
        if BIAS not in self.model._parameters:
            self.model.logit_scale.data.clamp_(max=MOST)


def _pooled(features: Any) -> Tensor:
    """The features in what a tower returns: a tensor, or, in newer versions, an output that has them."""
    return features if isinstance(features, Tensor) else features.pooler_output
