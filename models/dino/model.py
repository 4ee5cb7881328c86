"""DINO (arXiv 2104.14294), and any ViT of its kind: transformers' ViTForImageClassification under its published names.

The names are those of `facebook/dino-vitb16` and of every folder that transformers saves; what is saved here loads
there. Pre-norm blocks, GELU, the classifier reads the class token. Shapes: B images, L = 1 + patches, V width.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import find_weights, load_weights
from models.parts.similarity import head
from models.parts.sizes import check_sizes
from sparsity.errors import UserError
from sparsity.view import Output, Outputs, PrunableView

log = logging.getLogger(__name__)

KEPT_DENSE = ("classifier",)
POSITIONS = ("vit.embeddings.position_embeddings",)  # interpolated when a checkpoint has another image size
OPTIONAL = ("classifier.*",)  # a checkpoint without it gets a random one
HARMLESS = ("vit.pooler.*", "vit.embeddings.mask_token")  # superfluous in checkpoints made for other ends
REBUILT = ()  # state that a checkpoint need not have, since it is made anew


@dataclass(frozen=True)
class Config:
    """Sizes of the vision transformer; the defaults are ViT-B/16 at 224 x 224 with ImageNet's classes."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    classes: int = 1000
    eps: float = 1e-12

    def __post_init__(self):
        check_sizes(self)
        if self.width % self.heads:
            raise UserError(f"width must be a multiple of heads = {self.heads}, got {self.width!r}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size!r}")
        if self.classes < 2:
            raise UserError(f"classes must be at least 2, got {self.classes!r}")

    @property
    def tokens(self) -> int:
        return 1 + (self.image_size // self.patch_size) ** 2


def _only(**modules: nn.Module) -> nn.Module:
    """A module that holds others: a level of the published names, without a forward."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


class Embeddings(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, L, V): class token and patches, with positions added."""

    def __init__(self, config: Config):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.patch_embeddings = _only(
            projection=nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)
        )

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embeddings.projection(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1) + self.position_embeddings


class SelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value = (nn.Linear(config.width, config.width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query, self.key, self.value)
        )  # (B, H, L, V / H)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention = _only(
            attention=SelfAttention(config), output=_only(dense=nn.Linear(config.width, config.width))
        )
        self.intermediate = _only(dense=nn.Linear(config.width, config.mlp_width))
        self.output = _only(dense=nn.Linear(config.mlp_width, config.width))
        self.layernorm_before = nn.LayerNorm(config.width, eps=config.eps)
        self.layernorm_after = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, V)
        x = x + self.attention.output.dense(self.attention.attention(self.layernorm_before(x)))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


class ViT(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, L, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = _only(layer=nn.ModuleList(Block(config) for _ in range(config.layers)))
        self.layernorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embeddings(image)
        for block in self.encoder.layer:
            x = block(x)
        return self.layernorm(x)


class ViTForImageClassification(nn.Module):
    """`model(batch)` returns the cross-entropy of a batch of labelled images as a dict with "loss"."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vit = ViT(config)
        self.classifier = nn.Linear(config.width, config.classes)

    @torch.no_grad()
    def initialise(self) -> "ViTForImageClassification":
        """Random weights for training from scratch: N(0, 1 / (2 * inputs)) for layers, biases 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0.0, (2 * module.weight[0].numel()) ** -0.5)
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        self.vit.embeddings.cls_token.normal_(0.0, 0.02)
        self.vit.embeddings.position_embeddings.normal_(0.0, 0.02)
        return self

    def features(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what the classifier reads, the class token (B, V)."""
        return self.vit(image)[:, 0]

    def classify(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes), float32 under autocast."""
        return head(self.classifier, self.features(image))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of `batch` = {"image": (B, 3, H, W), "label": (B,)}."""
        return {"loss": F.cross_entropy(self.classify(batch["image"]).float(), batch["label"])}


def published_name(name: str) -> str:
    """Name of a weight in this model: checkpoints without a classifier leave the leading "vit." out."""
    return name if name.startswith(("vit.", "classifier.")) else f"vit.{name}"


def build(config: Config, weights: str | Path | None = None) -> ViTForImageClassification:
    """A model of these sizes with the weights of a file, a folder that transformers saved or a name on its hub, or
    random ones. A checkpoint without a classifier (as `facebook/dino-vitb16`) gets a random one, with a warning.
    """
    model = ViTForImageClassification(config).initialise()
    if weights is None:
        return model
    lacking = load_weights(
        model,
        find_weights(weights),
        positions=POSITIONS,
        ignored=HARMLESS,
        optional=OPTIONAL,
        rename=published_name,
    )
    if lacking:
        log.warning("%s has no classifier: that of %d classes is random and must be trained", weights, config.classes)
    return model


def outputs(model: ViTForImageClassification, batch: dict[str, Tensor]) -> Outputs:
    """Return the logits (B, classes), and what the classifier reads (B, V)."""
    features = model.features(batch["image"])
    return {
        "logits": Output("logits", head(model.classifier, features)),
        "features": Output("states", features),
    }


def prunable_view(model: ViTForImageClassification) -> PrunableView:
    """The prunable weights of the encoder in one group, "vision"; the classifier is kept dense."""
    return PrunableView(
        model,
        group_of=lambda name: "vision",
        keep_dense=KEPT_DENSE,
        forward=lambda batch: model.classify(batch["image"]),
        loss=lambda batch, generator=None: model(batch)["loss"],
        blocks=list(model.vit.encoder.layer),
        outputs=outputs,
    )
