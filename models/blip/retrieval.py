"""BLIP fine-tuned for image-text retrieval: contrastive loss against momentum queues that know the sample of a feature,
and matching with hard negatives (arXiv 2201.12086).

Shapes as in models/blip/model.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.blip import model as blip
from models.blip.outputs import pair_outputs
from models.parts.losses import draw_negatives, gather_features, own_rows
from models.parts.similarity import similarity
from models.parts.task_model import TaskModel
from sparsity.view import PrunableView

TEXT = {"add_sep": True}  # [CLS] x [SEP]
NEW = ()
NO_SAMPLE = -100  # id of a slot of the queues that no sample of this training fills
DROPPED = ("text_decoder.*", "queue_ptr", "*.weight_pruning_mask", "*.bias_pruning_mask")


class BLIPRetrieval(blip.ImageText, TaskModel):
    """negative_all_rank: the negatives of ITM are drawn from the batches of all ranks, not from this rank's alone.
    alpha: share of the momentum copies' similarities in the targets of ITC, reached after the first epoch.
    """

    pointer = "ptr_queue"

    def __init__(self, config: blip.Config, negative_all_rank: bool = True, alpha: float = 0.4):
        super().__init__(config)
        self.negative_all_rank, self.alpha = negative_all_rank, alpha

    def register_queues(self) -> None:
        super().register_queues()
        pointer = self._buffers.pop(self.pointer)
        self.register_buffer("idx_queue", torch.full((1, self.config.queue_size), NO_SAMPLE))
        self.register_buffer(self.pointer, pointer)

    def forward(self, batch: dict, epoch: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "itc" and "itm" of `image`, `text_ids`, `text_atts` and, where given, `sample_ids`: equal ones are no
        negatives of each other. generator draws the negatives.
        """
        temp, text, atts = self.temperature(), batch["text_ids"], batch["text_atts"]
        ids = batch.get("sample_ids")
        image, image_feat = self.encode_image(batch["image"])
        grounded, text_feat = self.encode_text(text, atts)
        keys = self.momentum_features(batch["image"], text, atts)
        similarities = self.similarities((image_feat, text_feat), keys, temp)
        targets, alpha = self.targets(similarities[0], ids), self.alpha * min(1.0, epoch)
        losses = {"itc": self.contrastive_loss(similarities, keys, temp, targets, alpha)}
        image_keys, text_keys = map(gather_features, keys)
        own_ids = text.new_full((len(text),), NO_SAMPLE) if ids is None else ids
        self.enqueue(image_queue=image_keys, text_queue=text_keys, idx_queue=gather_features(own_ids))

        own = torch.arange(len(text), device=text.device)
        all_ids = ids
        if self.negative_all_rank:
            own = own_rows(len(text), text.device)
            image, grounded, atts = (gather_features(part) for part in (image, grounded, atts))
            image_feat, text_feat = gather_features(image_feat), gather_features(text_feat)
            all_ids = None if ids is None else gather_features(ids)
        all_ids = torch.arange(len(grounded), device=text.device) if all_ids is None else all_ids
        with torch.no_grad():
            t2i, i2t = similarity(text_feat[own], image_feat, temp), similarity(image_feat[own], text_feat, temp)
        negatives = draw_negatives(t2i, i2t, all_ids[own], all_ids, floor=0.0, generator=generator)
        if negatives is None:  # nothing to tell apart; the parameters still take part in the step, as DDP wants
            losses["itm"] = 0.0 * self.match(grounded[own], atts[own], image[own]).sum()
        else:
            losses["itm"] = self.matching_loss(grounded, atts, image, negatives, own)
        return {"loss": losses["itc"] + losses["itm"], **losses}

    def targets(self, similarity: Tensor, ids: Tensor | None) -> Tensor:
        """(B, B + Q), as the similarities: each row spread over the samples of equal id, in batch and queue."""
        if ids is None:
            return torch.eye(*similarity.shape).to(similarity)
        known = torch.cat([ids, self.idx_queue[0]])
        same = (ids[:, None] == known[None, :]).to(similarity.dtype)
        return same / same.sum(1, keepdim=True)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.visual_encoder.blocks, *self.text_encoder.encoder.layer]

    def on_pruned(self) -> None:
        self.reset_momentum()


def task_names(name: str) -> tuple[str, ...]:
    """The decoder's own weights have no part in retrieval; what it shares with the encoder is named after that."""
    return () if name.startswith("text_decoder.") else (name,)


def build(config: blip.Config, weights: str | Path | None = None, **options: bool) -> BLIPRetrieval:
    """Retrieval model of these sizes, from a checkpoint of BLIP or of itself, or random."""
    model = BLIPRetrieval(config, **options)
    return model.initialise() if weights is None else blip.load(model, weights, (*blip.HARMLESS, *DROPPED))


def prunable_view(model: BLIPRetrieval) -> PrunableView:
    """The weights that are prunable in BLIP, in its groups."""
    return PrunableView(model, group_of=blip.group_of, keep_dense=blip.KEPT_DENSE, outputs=pair_outputs)
