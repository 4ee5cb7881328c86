"""The files that other programs read beside the weights of this project's models."""

import dataclasses
from typing import Any

from models.dino.model import Config as ViT

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def files_of(sizes: Any) -> dict[str, dict[str, Any]]:
    """Return file name -> content: for `dino` what transformers' ViTForImageClassification reads, for others sizes."""
    if not isinstance(sizes, ViT):
        return {"config.json": dataclasses.asdict(sizes)} if dataclasses.is_dataclass(sizes) else {}
    side = {"height": sizes.image_size, "width": sizes.image_size}
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_width,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "layer_norm_eps": sizes.eps,
        "hidden_act": "gelu",
        "id2label": {str(i): f"LABEL_{i}" for i in range(sizes.classes)},
    }
    processor = {"image_processor_type": "ViTImageProcessor", "size": side, "image_mean": MEAN, "image_std": STD}
    processor |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    return {"config.json": config, "preprocessor_config.json": processor}
