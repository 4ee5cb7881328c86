"""XVLM fine-tuned for captioning: its BERT of all layers, run causally, writes about the image (arXiv 2111.08276).

Shapes as in models/parts/captioning.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.checkpoint import load_weights
from models.parts.bert import BertForMaskedLM
from models.parts.captioning import Captioner, outputs
from models.parts.clip_vision import CLIPVisionTransformer
from models.xvlm import model as xvlm
from sparsity.view import PrunableView

TEXT = {"add_sep": True}  # [CLS] a picture of x [SEP]
NEW = ()
DROPPED = ("vision_proj.*", "text_proj.*", "temp", "itm_head.*", "bbox_head.*")  # of the pretrained model
HARMLESS = ("*.position_ids", "*.cls.predictions.bias", "*.weight_pruning_mask", "*.bias_pruning_mask")
_KEPT = ("vision_encoder.", "text_decoder.")


class XVLMCaptioning(Captioner):
    """options: of `Captioner`."""

    def __init__(self, config: xvlm.Config, **options: Any):
        super().__init__(**options)
        self.config = config
        self.vision_encoder = CLIPVisionTransformer(config.vision)
        self.text_decoder = BertForMaskedLM(config.text, config.vision.width, causal=True)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.vision_encoder(image)

    def language_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy to 1 - s for the token and s / vocab for each other one, s the label smoothing.

        So the published code has it; PyTorch's adds s / vocab to the token, too.
        """
        smoothing, log = self.label_smoothing, logits.log_softmax(-1)
        expected = log.gather(1, targets[:, None]).mean()
        return -(1 - smoothing - smoothing / logits.shape[1]) * expected - smoothing * log.mean()

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.vision_encoder.encoder.layers, *self.text_decoder.bert.encoder.layer]


def task_names(name: str) -> tuple[str, ...]:
    name = name.replace("text_encoder.", "text_decoder.", 1) if name.startswith("text_encoder.") else name
    return (name,) if name.startswith(_KEPT) else ()


def build(config: xvlm.Config, weights: str | Path | None = None, **options: Any) -> XVLMCaptioning:
    """Captioning model of these sizes, from a checkpoint of XVLM or of itself, or random.

    options: of `Captioner`.
    """
    model = XVLMCaptioning(config, **options)
    if weights is None:
        trunk = xvlm.build(config).state_dict()
        model.load_state_dict({new: tensor for name, tensor in trunk.items() for new in task_names(name)})
        return model
    renamed = {"rename": lambda name: next(iter(task_names(name)), name)}
    load_weights(model, weights, positions=xvlm.POSITIONS, ignored=(*HARMLESS, *DROPPED), **renamed)
    return model


def prunable_view(model: XVLMCaptioning) -> PrunableView:
    """The weights that are prunable in XVLM, in its groups."""
    group_of = xvlm.modality(model.config, "text_decoder.bert.encoder.layer")
    return PrunableView(model, group_of=group_of, keep_dense=("text_decoder.cls.*",), outputs=outputs)
