"""BLIP fine-tuned for visual question answering: the text encoder reads the question with the image, the decoder writes
answers to its states (arXiv 2201.12086, section 5.3).

What encoder and decoder share in the pretrained model, each has for itself here, with the same mask. Shapes as in
models/parts/vqa.py.
"""

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from models.blip import model as blip
from models.parts.bert import Bert, BertForMaskedLM
from models.parts.vqa import Answering, load, outputs
from sparsity.view import PrunableView

TEXT = {"add_sep": True}  # [ENC] question [SEP]
ANSWER_ENDS = 2  # [DEC] answer [SEP] [SEP]
NEW = ()
DROP_PATH = 0.1  # of the visual encoder, where the configuration says nothing
DROPPED = ("*_m.*", "*_queue", "queue_ptr", "vision_proj.*", "text_proj.*", "temp", "itm_head.*")  # of pretraining
IGNORED = (*blip.HARMLESS, "text_decoder.cls.predictions.bias", "*.weight_pruning_mask", "*.bias_pruning_mask")


class BLIPVQA(Answering):
    label_smoothing = blip.LABEL_SMOOTHING

    def __init__(self, config: blip.Config):
        super().__init__(config, inherit_mask=True)
        self.decoder_start, self.encoder_start = config.text.vocab_size - 2, config.text.vocab_size - 1
        vision = config.vision
        if vision.drop_path is None:
            vision = dataclasses.replace(vision, drop_path=DROP_PATH)
        self.visual_encoder = blip.vision_transformer(vision)
        self.text_encoder = Bert(config.text, config.vision.width)
        self.text_decoder = BertForMaskedLM(config.text, config.text.width, causal=True)

    @torch.no_grad()
    def initialise(self) -> "BLIPVQA":
        """Random weights."""
        blip.initialise(self)
        self.visual_encoder.cls_token.normal_(0.0, 0.02)
        self.visual_encoder.pos_embed.normal_(0.0, 0.02)
        return self

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual_encoder.forward_features(image)

    def ask(self, image: Tensor, ids: Tensor, atts: Tensor) -> Tensor:
        return self.text_encoder(blip.started(ids, self.encoder_start), atts, image)

    def begun(self, answer_ids: Tensor) -> Tensor:
        return blip.started(answer_ids, self.decoder_start)

    def score(self, first: Tensor, losses: Tensor) -> Tensor:
        return -losses

    def blocks(self) -> Sequence[nn.Module]:
        text = *self.text_encoder.encoder.layer, *self.text_decoder.bert.encoder.layer
        return [*self.visual_encoder.blocks, *text]

    def copies(self) -> dict[str, str]:
        """Map the decoder's parameters to those that the pretrained model shares: all but self-attention."""
        names = [name for name, _ in self.text_decoder.bert.named_parameters() if ".attention." not in name]
        return {f"text_decoder.bert.{name}": f"text_encoder.{name}" for name in names}


def task_names(name: str) -> tuple[str, ...]:
    return () if any(fnmatchcase(name, glob) for glob in DROPPED) else (name,)


def build(config: blip.Config, weights: str | Path | None = None, inherit_mask: bool = True) -> BLIPVQA:
    """Model of these sizes, from a checkpoint of BLIP or of itself, or random.

    inherit_mask: of no effect, since the decoder is part of the pretrained model and has its masks. Raises UserError
    where the checkpoint is of another model.
    """
    model = BLIPVQA(config)
    if weights is None:
        return model.initialise()
    return load(model, weights, positions=blip.POSITIONS, ignored=(*IGNORED, *DROPPED))


def prunable_view(model: BLIPVQA) -> PrunableView:
    """The weights that are prunable in BLIP, in its groups; those that it shares between encoder and decoder twice."""
    return PrunableView(model, group_of=blip.group_of, keep_dense=("text_decoder.cls.*",), outputs=outputs)
