"""XVLM fine-tuned for visual question answering: a decoder of as many layers as the fusion encoder has, which begins as
its copy and attends to the question's states (arXiv 2111.08276, section 4.3).

Shapes as in models/parts/vqa.py.
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from models.parts.bert import Bert, BertForMaskedLM
from models.parts.clip_vision import CLIPVisionTransformer
from models.parts.vqa import Answering, load, outputs
from models.xvlm import model as xvlm
from sparsity.view import PrunableView

TEXT = {"add_sep": False}  # [CLS] question
ANSWER_ENDS = 1  # [CLS] answer [SEP]
NEW = ()  # the decoder is a copy
DROPPED = ("vision_proj.*", "text_proj.*", "temp", "itm_head.*", "bbox_head.*")  # of the pretrained model
IGNORED = (*xvlm.HARMLESS, "text_decoder.cls.predictions.bias", "*.weight_pruning_mask", "*.bias_pruning_mask")
_RENAMED = {"text_encoder.bert.": "text_encoder.", "text_encoder.cls.": "text_decoder.cls."}


class XVLMVQA(Answering):
    def __init__(self, config: xvlm.Config, inherit_mask: bool = False):
        super().__init__(config, inherit_mask)
        text = config.text
        self.vision_encoder = CLIPVisionTransformer(config.vision)
        self.text_encoder = Bert(text, config.vision.width)
        decoder = dataclasses.replace(text, layers=text.layers - text.fusion_layer, fusion_layer=0)
        self.text_decoder = BertForMaskedLM(decoder, text.width, causal=True)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.vision_encoder(image)

    def ask(self, image: Tensor, ids: Tensor, atts: Tensor) -> Tensor:
        return self.text_encoder(ids, atts, image)

    def score(self, first: Tensor, losses: Tensor) -> Tensor:
        """log p of the first token counts twice, as published."""
        return first - losses

    def blocks(self) -> Sequence[nn.Module]:
        text = *self.text_encoder.encoder.layer, *self.text_decoder.bert.encoder.layer
        return [*self.vision_encoder.encoder.layers, *text]

    def copies(self) -> dict[str, str]:
        """All of the decoder: layer i begins as fusion layer i."""
        fusion, pairs = self.config.text.fusion_layer, {}
        for name, _ in self.text_decoder.bert.named_parameters():
            head, layer, rest = name.partition("encoder.layer.")
            number, _, key = rest.partition(".")
            source = f"{layer}{fusion + int(number)}.{key}" if layer else head
            pairs[f"text_decoder.bert.{name}"] = f"text_encoder.{source}"
        return pairs


def translated(name: str) -> str:
    """Name in this model of what the pretrained model calls `name`."""
    for prefix, own in _RENAMED.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def task_names(name: str) -> tuple[str, ...]:
    return () if any(fnmatchcase(name, glob) for glob in DROPPED) else (translated(name),)


def build(config: xvlm.Config, weights: str | Path | None = None, inherit_mask: bool = False) -> XVLMVQA:
    """Model of these sizes, from a checkpoint of XVLM or of itself, or random.

    Raises UserError where the checkpoint is of another model, or where the decoder cannot begin as a copy.
    """
    model = XVLMVQA(config, inherit_mask)
    if weights is None:
        trunk = xvlm.build(config)
        model.vision_encoder.load_state_dict(trunk.vision_encoder.state_dict())
        model.text_encoder.load_state_dict(trunk.bert.state_dict())
        model.text_decoder.cls.load_state_dict(trunk.text_encoder.cls.state_dict())
        model.begin_decoder()
        return model
    return load(model, weights, positions=xvlm.POSITIONS, ignored=(*IGNORED, *DROPPED), rename=translated)


def prunable_view(model: XVLMVQA) -> PrunableView:
    """The weights that are prunable in XVLM, in its groups, and those of the decoder where it inherits their masks."""
    group_of = xvlm.modality(model.config, "text_encoder.encoder.layer")
    keep_dense = ("text_decoder.cls.*",) if model.inherit_mask else ("text_decoder.*",)
    return PrunableView(model, group_of=group_of, keep_dense=keep_dense, outputs=outputs)
