"""The files that transformers reads beside the weights of this model, as of any ViTForImageClassification."""

from typing import Any

from models.dino.model import Config

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def files(sizes: Config) -> dict[str, dict[str, Any]]:
    """Return file name -> content."""
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
