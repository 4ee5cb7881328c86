"""The bundled classifier as a model of timm: `timm.create_model("vit_mini", pretrained=True)` once this is imported.

It is the model of configs/dino/model_mini.yaml, so that whatever works with timm works here without a download.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parents[2] / "data" / "vit_mini.safetensors"
SIZES = {"img_size": 72, "patch_size": 12, "embed_dim": 192, "depth": 8, "num_heads": 3, "mlp_ratio": 4.0}

default_cfgs = generate_default_cfgs(  # timm looks for this name
    {
        "vit_mini": {
            "file": str(WEIGHTS),
            "num_classes": 76,
            "input_size": (3, 72, 72),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "same as this project's",
        }
    }
)

_NAMES = (  # of transformers' ViT -> of timm's
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_PARTS = ("query", "key", "value")
_PART = re.compile(r"\.attention\.attention\.(query|key|value)\.")


def to_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names of transformers' ViT under those of timm's, query, key and value in one; one that has
    timm's names stays as it is. Positions are fitted to the model's image size.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part = _PART.search(name)
        name = _PART.sub(".attn.qkv.", name)
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        if part:
            parts.setdefault(name, {})[part[1]] = tensor
        else:
            result[name] = tensor
    fused = {name: torch.cat([found[part] for part in _PARTS]) for name, found in parts.items()}
    return checkpoint_filter_fn(result | fused, model)


@register_model
def vit_mini(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """ViT of 3.7 M parameters, 72 x 72 pixels in patches of 12, trained on the bundled glyphs."""
    options = {**SIZES, "norm_layer": partial(nn.LayerNorm, eps=1e-12), **options}
    return build_model_with_cfg(VisionTransformer, "vit_mini", pretrained, pretrained_filter_fn=to_timm, **options)
