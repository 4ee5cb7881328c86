"""Tiny random models of many architectures of timm and transformers, each with a batch that it takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import transformers
from timm.models import mlp_mixer
from torch import nn

from tests.tiny_models import TIMM, TRANSFORMERS, VISION, VIT, batch_for, words

MIXER = {"img_size": 32, "patch_size": 16, "num_blocks": 2, "embed_dim": 32, "num_classes": 5}
MIXERS = {
    "mixer": {},
    "gmlp": {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_layer": mlp_mixer.GatedMlp, "mlp_ratio": 6},
    "resmlp": {"block_layer": mlp_mixer.ResBlock, "mlp_ratio": 4},
}
FLAT = {**VIT, "depth": 2}
STAGES = {"num_classes": 5, "depths": (1, 1, 1, 1)}
TIMM_MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # name, arguments, side of the images
    **{kind: (name, options, options.get("img_size", 32)) for kind, (name, options) in TIMM.items()},
    "test_vit2": ("test_vit2", {"num_classes": 5, "img_size": 32}, 32),
    "test_vit3": ("test_vit3", {"num_classes": 5, "img_size": 32}, 32),
    "test_vit4": ("test_vit4", {"num_classes": 5, "img_size": 32}, 32),
    "test_convnext": ("test_convnext", {"num_classes": 5}, 64),
    "test_convnext2": ("test_convnext2", {"num_classes": 5}, 64),
    "test_convnext3": ("test_convnext3", {"num_classes": 5}, 64),
    "mambaout": ("test_mambaout", {"num_classes": 5}, 64),
    "cait": ("cait_xxs24_224", FLAT, 32),
    "xcit": ("xcit_nano_12_p16_224", FLAT, 32),
    "flexivit": ("flexivit_small", FLAT, 32),
    "dinov2": ("vit_small_patch14_dinov2", {**FLAT, "img_size": 28}, 28),
    "dinov3": ("vit_small_patch16_dinov3", FLAT, 32),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", FLAT, 32),
    "samvit": ("samvit_base_patch16_224", {**FLAT, "global_attn_indexes": (1,)}, 32),
    "mobilevit": ("mobilevit_xxs", {"num_classes": 5}, 64),
    "edgenext": ("edgenext_xx_small", {**STAGES, "dims": (16, 24, 32, 48)}, 64),
    "twins": (
        "twins_pcpvt_small",
        {**STAGES, "img_size": 64, "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 2, 2)},
        64,
    ),
    "pvt": ("pvt_v2_b0", {**STAGES}, 64),
    "davit": ("davit_tiny", {**STAGES, "embed_dims": (16, 32, 32, 64), "num_heads": (2, 2, 2, 2)}, 64),
    "hiera": ("hiera_tiny_224", {"num_classes": 5, "img_size": (64, 64), "stages": (1, 1, 1, 1), "embed_dim": 32}, 64),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}, 64),
}


def stirred(model: nn.Module) -> nn.Module:
    """A model in which every weight counts: new ones scale some branches by nearly 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def timm_model(kind: str) -> tuple[nn.Module, Any, Callable[[], nn.Module]]:
    """Return a model in evaluation mode, a batch, and what makes the model anew."""
    if kind in MIXERS:
        make, side = partial(mlp_mixer.MlpMixer, **MIXERS[kind], **MIXER), MIXER["img_size"]
    else:
        name, options, side = TIMM_MODELS[kind]
        make = partial(timm.create_model, name, **options)
    return stirred(make().eval()), (torch.randn(2, 3, side, side), torch.tensor([0, 3])), make


GENERIC = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WORDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {  # class -> what its configuration has beside VISION
    "ViT": {},
    "DeiT": {},
    "Beit": {},
    "Data2VecVision": {},
    "Dinov2": {},
    "Dinov2WithRegisters": {},
    "IJepa": {},
    "ViTMSN": {},
    "PvtV2": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]},
}
WINDOWS = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
STAGED = {  # those that have other names for their sizes
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "ConvNext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4},
}
TEXTS = {  # class -> what its configuration has beside GENERIC
    "BertForMaskedLM": {},
    "RobertaForMaskedLM": {},
    "ElectraForMaskedLM": {"embedding_size": 16},
    "AlbertForMaskedLM": {"embedding_size": 16},
    "DistilBertForMaskedLM": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "DebertaV2ForMaskedLM": {},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **WORDS},
    "OPTForCausalLM": {"ffn_dim": 64, "word_embed_proj_dim": 32, **WORDS},
    "LlamaForCausalLM": {"num_key_value_heads": 2, **WORDS},
    "MistralForCausalLM": {"num_key_value_heads": 2, **WORDS},
    "Qwen2ForCausalLM": {"num_key_value_heads": 2, **WORDS},
    "Gemma2ForCausalLM": {"num_key_value_heads": 1, "head_dim": 16, **WORDS},
    "PhiForCausalLM": {"num_key_value_heads": 2, **WORDS},
    "GPTNeoXForCausalLM": {**WORDS},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 2, **WORDS},
    "T5ForConditionalGeneration": {
        **{"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "decoder_start_token_id": 0}
    },
}


def _images(kind: str) -> tuple[nn.Module, Any]:
    sizes = STAGED[kind] if kind in STAGED else {**VISION, **IMAGES[kind]}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=5)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 3])}


def _texts(kind: str) -> tuple[nn.Module, Any]:
    name = kind.split("For")[0].removesuffix("LMHeadModel")
    config = getattr(transformers, f"{name}Config")(**{**GENERIC, **TEXTS[kind]})
    batch = words([[1, 5, 6, 7, 2], [1, 9, 2]])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return getattr(transformers, kind)(config), {**batch, "labels": labels}


TRANSFORMERS_MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{kind: partial(_images, kind) for kind in (*IMAGES, *STAGED)},
    **{kind: partial(_texts, kind) for kind in TEXTS},
    **{kind: lambda make=make, kind=kind: (make(), batch_for(kind)) for kind, make in TRANSFORMERS.items()},
}
