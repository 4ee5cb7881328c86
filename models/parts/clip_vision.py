"""CLIP's vision transformer with region attention, under the key names of the public XVLM checkpoints.

Pre-norm blocks, quick-GELU, a LayerNorm before and after the blocks.
Shapes: B images, R regions, L = 1 + patches, V width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts.sizes import check_sizes
from sparsity.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; the defaults are CLIP's ViT-B/16 at 224 x 224."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    local_attn_depth: int = 4  # last blocks, in which a region attends to its own patches only
    eps: float = 1e-5

    def __post_init__(self):
        check_sizes(self, "local_attn_depth")
        if self.width % self.heads:
            raise UserError(f"width must be a multiple of heads = {self.heads}, got {self.width!r}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size!r}")
        if not 0 <= self.local_attn_depth <= self.layers:
            raise UserError(f"local_attn_depth must be from 0 to layers {self.layers}, got {self.local_attn_depth!r}")

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2


class SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, L, V / H)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Blocks(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))


class CLIPVisionTransformer(nn.Module):
    """Image encoder; with regions given, its last `local_attn_depth` blocks also run once per region."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.local_attn_depth = config.local_attn_depth
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.register_buffer("position_ids", torch.arange(config.tokens).unsqueeze(0))
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.pos_embed = nn.Embedding(config.tokens, config.width)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.eps)  # spelt as in the public checkpoints
        self.encoder = Blocks(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.eps)

    def embed(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, V)."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(image.shape[0], 1, -1).to(patches.dtype), patches], dim=1)
        return self.pre_layrnorm(tokens + self.pos_embed(self.position_ids))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> features of the whole images (B, L, V)."""
        x = self.embed(image)
        for block in self.encoder.layers:
            x = block(x)
        return self.post_layernorm(x)

    def forward_regions(self, image: Tensor, region_image: Tensor, region_atts: Tensor) -> tuple[Tensor, Tensor]:
        """Features of R regions and of the B whole images they lie in.

        image: (B, 3, H, W). region_image: (R,), the image each region belongs to. region_atts: (R, L), 1 at the class
        token and at the region's patches. Returns (R, L, V) and (B, L, V).
        """
        shared = len(self.encoder.layers) - self.local_attn_depth
        x = self.embed(image)
        for block in self.encoder.layers[:shared]:
            x = block(x)
        # Regions and whole images go through the last blocks as one batch: whole images attend to everything.
        atts = torch.cat([region_atts.bool(), region_atts.new_ones(x.shape[:2], dtype=torch.bool)])
        x, mask = torch.cat([x[region_image], x]), atts[:, None, None, :]
        for block in self.encoder.layers[shared:]:
            x = block(x, mask)
        x = self.post_layernorm(x)
        return x[: len(region_image)], x[len(region_image) :]
