"""XVLM fine-tuned for image-text retrieval: contrastive loss and matching with hard negatives (arXiv 2111.08276).

Shapes as in models/xvlm/model.py.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights
from models.parts.bert import Bert
from models.parts.losses import contrastive_loss, draw_negatives, gather_features, own_rows
from models.parts.similarity import similarity
from models.parts.task_model import TaskModel
from models.xvlm import model as xvlm
from sparsity.view import Outputs, PrunableView

TEXT = {"add_sep": False}  # [CLS] x
NEW = ()
NEGATIVES_FLOOR = 1e-5
DROPPED = ("bbox_head.*", "text_encoder.cls.*", "*.weight_pruning_mask", "*.bias_pruning_mask")
_TRUNK = "text_encoder.bert."


class XVLMRetrieval(xvlm.ImageText, TaskModel):
    """negative_all_rank: the negatives of ITM are drawn from the batches of all ranks, not from this rank's alone."""

    def __init__(self, config: xvlm.Config, negative_all_rank: bool = True):
        super().__init__(config, Bert(config.text, config.vision.width))
        self.negative_all_rank = negative_all_rank

    @property
    def bert(self) -> Bert:
        return self.text_encoder

    def forward(self, batch: dict, epoch: float = 0.0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "itc" and "itm" of `image`, `text_ids`, `text_atts` and, where given, `sample_ids`: equal ones are no
        negatives of each other. generator draws the negatives.
        """
        temp = self.temperature()
        image, image_feat = self.encode_image(batch["image"])
        atts, ids = batch["text_atts"], batch.get("sample_ids")
        states, text_feat = self.encode_text(batch["text_ids"], atts)
        features = gather_features(image_feat), gather_features(text_feat)
        all_ids = None if ids is None else gather_features(ids)
        losses = {"itc": contrastive_loss(*features, temp, all_ids)}

        own = torch.arange(len(image), device=image.device)
        if self.negative_all_rank:
            own = own_rows(len(image), image.device)
            image, states, atts = (gather_features(part) for part in (image, states, atts))
        else:
            features, all_ids = (image_feat, text_feat), ids
        losses["itm"] = self._matching(states, atts, image, features, temp, all_ids, own, generator)
        return {"loss": losses["itc"] + losses["itm"], **losses}

    def _matching(
        self,
        states: Tensor,
        atts: Tensor,
        image: Tensor,
        features: tuple[Tensor, Tensor],
        temp: Tensor,
        ids: Tensor | None,
        own: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """ITM of the pairs `own` (n,), whose negatives are drawn from all P that are given."""
        ids = torch.arange(len(image), device=image.device) if ids is None else ids
        image_feat, text_feat = (feature.detach() for feature in features)
        with torch.no_grad():
            text_to_image = similarity(text_feat[own], image_feat, temp)
            image_to_text = similarity(image_feat[own], text_feat, temp)
        options = {"floor": NEGATIVES_FLOOR, "generator": generator}
        negatives = draw_negatives(text_to_image, image_to_text, ids[own], ids, **options)
        if negatives is None:  # nothing to tell apart; the parameters still take part in the step, as DDP wants
            return 0.0 * self.match(states[own], atts[own], image[own]).sum()
        return self.matching_loss(states, atts, image, None, negatives, own)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.vision_encoder.encoder.layers, *self.text_encoder.encoder.layer]


def task_names(name: str) -> tuple[str, ...]:
    if any(fnmatchcase(name, glob) for glob in DROPPED):
        return ()
    return (name.replace(_TRUNK, "text_encoder.", 1) if name.startswith(_TRUNK) else name,)


def build(config: xvlm.Config, weights: str | Path | None = None, **options: bool) -> XVLMRetrieval:
    """Retrieval model of these sizes, from a checkpoint of XVLM or of itself, or random."""
    model = XVLMRetrieval(config, **options)
    if weights is None:
        return model.initialise()
    names = {"ignored": (*xvlm.HARMLESS, *DROPPED), "rename": lambda name: next(iter(task_names(name)), name)}
    load_weights(model, weights, positions=xvlm.POSITIONS, **names)
    return model


def prunable_view(model: XVLMRetrieval) -> PrunableView:
    """The weights that are prunable in XVLM, in its groups."""
    group_of = xvlm.modality(model.config, "text_encoder.encoder.layer")
    return PrunableView(model, group_of=group_of, keep_dense=xvlm.KEPT_DENSE, outputs=outputs)


def outputs(model: XVLMRetrieval, batch: dict) -> Outputs:
    """Return what `models.xvlm.model.pair_outputs` gives for whole images."""
    return xvlm.pair_outputs(model, batch, model.vision_encoder(batch["image"]))
