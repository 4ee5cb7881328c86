"""Reading of the names of layers in models that this project does not know: towers, output heads, text.

Names that public vision-language models share, each in one table. Whoever has other names says so: `--groups`,
`--exclude`, or a view of their own.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape

from torch import nn

from sparsity.errors import UserError

REGEX = "re:"  # what a regular expression stands behind, where there could be a glob
# Group -> parts of a name that put a layer into it; the first group with one of its parts in the name takes it. CLIP
# and SigLIP (text_model, vision_model), BLIP-2 (vision_model, qformer, language_projection, language_model), LLaVA and
# PaliGemma (vision_tower, multi_modal_projector, language_model), Qwen-VL (visual, visual.merger, language_model),
# Idefics3 and SmolVLM (vision_model, connector, text_model), models that hear (audio_tower) and their like.
TOWERS: Mapping[str, frozenset[str]] = {
    "fusion": frozenset({"qformer", "cross_modal_text_layers", "cross_modal_image_layers"}),
    "projector": frozenset(
        {
            *("language_projection", "multi_modal_projector", "mm_projector", "merger", "merger_list"),
            *("deepstack_merger_list", "connector"),
        }
    ),
    "vision": frozenset(
        {
            *("vision_model", "vision_tower", "vision_encoder", "visual", "visual_encoder", "visual_model"),
            *("image_encoder", "image_tower", "visual_projection", "vision_projection"),
        }
    ),
    "audio": frozenset({"audio_model", "audio_tower", "audio_encoder", "speech_encoder", "audio_projection"}),
    "text": frozenset(
        {"text_model", "text_encoder", "text_decoder", "text_tower", "text_projection", "language_model"}
    ),
}
TEXT = "text"  # the group whose layers read text, so that padding can be among their inputs

# Layers at the top of a model that make its output from features: classifiers, language-model heads, projections of a
# contrastive model. Globs over names without a dot; what is inside such a module is part of it.
HEADS = (
    *("head", "heads", "head_dist", "fc", "classifier", "*_classifier", "score", "qa_outputs", "cls", "*_head"),
    *("visual_projection", "vision_projection", "vision_proj", "text_projection", "text_proj"),
)
# Heads that lie deeper: SigLIP's, of which the image head pools with an nn.MultiheadAttention (and is not used at all
# where the tower feeds a language model), and BLIP's.
DEEP_HEADS = (
    *("text_model.head", "vision_model.head.attention", "*vision_tower.head", "*vision_tower.vision_model.head"),
    *("text_encoder.cls", "text_decoder.cls"),
)
# Heads of detectors and segmenters, at any depth: decoder layers refine what these predict.
PREDICTORS = frozenset(
    {
        *("class_embed", "bbox_embed", "class_labels_classifier", "bbox_predictor", "class_predictor", "mask_embedder"),
        *("enc_score_head", "enc_bbox_head", "pre_bbox_head", "score_head", "bbox_head", "box_head", "class_head"),
        *("objectness_head", "decode_head", "auxiliary_head", "mask_head", "iou_prediction_head"),
        "output_hypernetworks_mlps",
    }
)

POOLED = re.compile(r"(?:^|\.)pooler\.")  # layers that read one vector a sample: no token of it is padding
CROSS_FED = re.compile(  # keys and values of cross-attention read what the other tower or the encoder made
    r"(?:^|\.)(?:crossattention|cross_attn|cross_attention|encoder_attn|EncDecAttention)\.(?:.*\.)?(?:k|v|key|value|k_proj|v_proj)\."
)
DECODER = re.compile(r"(?:^|\.)(?:text_)?decoder\.")


def is_head(name: str) -> bool:
    """Whether the module of this name is an output head, as far as the name tells."""
    deep = name.rpartition(".")[2] in PREDICTORS or any(fnmatchcase(name, glob) for glob in DEEP_HEADS)
    return deep or ("." not in name and any(fnmatchcase(name, glob) for glob in HEADS))


def tower(name: str) -> str | None:
    """The group of a layer by the parts of its name; None where they say nothing."""
    parts = set(name.split("."))
    return next((group for group, known in TOWERS.items() if parts & known), None)


def text_field(name: str, encoder_decoder: bool) -> str | None:
    """Which field of a batch says what tokens of this text layer's input are real; None where all are.

    name: of the weight. encoder_decoder: a text encoder feeds the text decoder (T5); else what cross-attention is fed
    with is an image.
    """
    decoded = encoder_decoder and DECODER.search(name)
    if POOLED.search(name) or (CROSS_FED.search(name) and not decoded):
        return None
    return "decoder_attention_mask" if decoded and not CROSS_FED.search(name) else "attention_mask"


def match_group(name: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """The first group with a glob that matches the name of a layer."""
    return next((g for g, globs in groups.items() if any(fnmatchcase(name, glob) for glob in globs)), None)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats, in its own order, an outer block before those in it: the members of a
    list or sequence that are of one kind and have layers in them.
    """
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in module)
            found += [child for child in module if kinds[type(child)] > 1 and any(True for _ in child.children())]
    return found


def as_globs(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return patterns as globs: a regular expression after "re:" becomes the names of layers that it matches from their
    beginning on, alone or with ".weight" behind; it stays as it is where there are none. UserError, naming the option,
    for one that is none.
    """
    found = []
    for pattern in patterns:
        if not pattern.startswith(REGEX):
            found.append(pattern)
            continue
        try:
            expression = re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise UserError(f"{option}: {pattern!r:.60} is no regular expression: {error}") from None
        matched = [n for n in names if n and (expression.match(n) or expression.match(f"{n}.weight"))]
        found += [escape(name) for name in matched] or [pattern]
    return found
