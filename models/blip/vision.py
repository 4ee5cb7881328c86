"""BLIP's vision transformer, built from timm's."""

from dataclasses import dataclass
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.parts.sizes import check_sizes
from sparsity.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision transformer; the defaults are ViT-B/16's at the resolution of the public 14M checkpoint.

    drop_path: rate of stochastic depth in training; default that of the task, which is 0 for all but VQA.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    drop_path: float | None = None

    def __post_init__(self):
        check_sizes(self)
        if self.drop_path is not None and self.drop_path >= 1:
            raise UserError(f"drop_path must be from 0 to below 1, got {self.drop_path!r}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size!r}")
        if self.width % self.heads:
            raise UserError(f"width must be a multiple of heads = {self.heads}, got {self.width!r}")

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2


def vision_transformer(config: VisionConfig) -> VisionTransformer:
    """timm's, whose keys are those of BLIP's checkpoints; `forward_features` gives all tokens after the norm."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path or 0.0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        num_classes=0,
    )
