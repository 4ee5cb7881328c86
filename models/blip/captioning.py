"""BLIP fine-tuned for captioning: visual encoder and text decoder (arXiv 2201.12086).

Shapes as in models/parts/captioning.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.blip import model as blip
from models.checkpoint import load_weights, read_weights
from models.parts.bert import BertForMaskedLM
from models.parts.captioning import Captioner, outputs
from sparsity.view import PrunableView

TEXT = {"add_sep": True}  # [DEC] a picture of x [SEP]; the model puts [DEC] in the place of [CLS]
NEW = ()
# Of the pretrained model; what its text encoder shares with the decoder may stand in a checkpoint under either name.
DROPPED = ("*_m.*", "*_queue", "*_ptr", "text_encoder.*", "vision_proj.*", "text_proj.*", "itm_head.*", "temp")
HARMLESS = ("*.position_ids", "*.cls.predictions.bias", "*.weight_pruning_mask", "*.bias_pruning_mask")
_ENCODER, _OWN = "text_encoder.", ".attention."  # self-attention is what encoder and decoder do not share
_KEPT = ("visual_encoder.", "text_decoder.")


class BLIPCaptioning(Captioner):
    """options: of `Captioner`."""

    def __init__(self, config: blip.Config, **options: Any):
        super().__init__(**options)
        self.decoder_start = config.text.vocab_size - blip.ADDED_TOKENS
        self.visual_encoder = blip.vision_transformer(config.vision)
        self.text_decoder = BertForMaskedLM(config.text, config.vision.width, causal=True)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual_encoder.forward_features(image)

    def started(self, ids: Tensor) -> Tensor:
        return blip.started(ids, self.decoder_start)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.visual_encoder.blocks, *self.text_decoder.bert.encoder.layer]


def task_names(name: str) -> tuple[str, ...]:
    if name.startswith(_ENCODER) and _OWN not in name:
        return (name.replace(_ENCODER, "text_decoder.bert.", 1),)
    return (name,) if name.startswith(_KEPT) else ()


def build(config: blip.Config, weights: str | Path | None = None, **options: Any) -> BLIPCaptioning:
    """Captioning model of these sizes, from a checkpoint of BLIP or of itself, or random.

    options: of `Captioner`.
    """
    model = BLIPCaptioning(config, **options)
    if weights is None:
        trunk = blip.build(config).state_dict()
        model.load_state_dict({name: tensor for name, tensor in trunk.items() if name.startswith(_KEPT)})
        return model
    given = set(read_weights(weights))

    def rename(name: str) -> str:
        own = next(iter(task_names(name)), name)
        return name if own in given else own

    load_weights(model, weights, positions=blip.POSITIONS, ignored=(*HARMLESS, *DROPPED), rename=rename)
    return model


def prunable_view(model: BLIPCaptioning) -> PrunableView:
    """The weights that are prunable in BLIP and that are here, in its groups."""
    return PrunableView(model, group_of=blip.group_of, keep_dense=("text_decoder.cls.*",), outputs=outputs)
