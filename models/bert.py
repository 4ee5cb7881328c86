"""BERT encoder whose upper layers may look at an image, under the key names of the public BERT and XVLM checkpoints.

Post-norm layers, exact GELU. Attention goes through `scaled_dot_product_attention`: no attention matrix is kept.
Shapes: B samples, T text tokens, L image tokens, D text width, V vision width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; the defaults are BERT-base, split into 6 text and 6 fusion layers."""

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    fusion_layer: int = 6  # first layer with cross-attention
    heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    eps: float = 1e-12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, got {self.width!r}")
        if not 0 <= self.fusion_layer <= self.layers:
            raise ValueError(f"fusion_layer must be from 0 to layers = {self.layers}, got {self.fusion_layer!r}")


class Embeddings(nn.Module):
    """Word + position + token-type embeddings, LayerNorm, dropout."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions).unsqueeze(0))

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : ids.shape[1]]
        x = self.word_embeddings(ids) + self.position_embeddings(positions) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))  # (B, T, D)


class SelfAttention(nn.Module):
    """Multi-head attention of `x` over `context`, whose width is `context_width` (over itself when None)."""

    def __init__(self, config: TextConfig, context_width: int):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None) -> Tensor:
        source = x if context is None else context
        projected = self.query(x), self.key(source), self.value(source)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)  # (B, H, T or L, D / H)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """Dense projection, dropout, residual connection, LayerNorm: the output half of BERT's attention and MLP."""

    def __init__(self, config: TextConfig, in_width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    def __init__(self, config: TextConfig, context_width: int):
        super().__init__()
        self.self = SelfAttention(config, context_width)
        self.output = Residual(config, config.width)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None = None) -> Tensor:
        return self.output(self.self(x, mask, context), x)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention, cross-attention to the image where `vision_width` is given, MLP."""

    def __init__(self, config: TextConfig, vision_width: int | None):
        super().__init__()
        self.attention = Attention(config, config.width)
        if vision_width is not None:
            self.crossattention = Attention(config, vision_width)
        self.intermediate = Intermediate(config)
        self.output = Residual(config, config.mlp_width)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor | None, image_mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        if image is not None:
            x = self.crossattention(x, image_mask, image)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config: TextConfig, vision_width: int):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, vision_width if i >= config.fusion_layer else None) for i in range(config.layers)
        )


def key_mask(atts: Tensor | None) -> Tensor | None:
    """(B, T) with 1 at the tokens to attend to -> boolean (B, 1, 1, T), as scaled_dot_product_attention takes it."""
    return None if atts is None else atts.bool()[:, None, None, :]


class Bert(nn.Module):
    """Layers below `fusion_layer` encode text; those from it on fuse text with image tokens."""

    def __init__(self, config: TextConfig, vision_width: int):
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, vision_width)

    def encode_text(self, ids: Tensor, atts: Tensor) -> Tensor:
        """Token ids and padding mask, both (B, T), through the text layers -> (B, T, D)."""
        x, mask = self.embeddings(ids), key_mask(atts)
        for layer in self.encoder.layer[: self.fusion_layer]:
            x = layer(x, mask, None, None)
        return x

    def fuse(self, text: Tensor, atts: Tensor, image: Tensor, image_atts: Tensor | None = None) -> Tensor:
        """Text states (B, T, D) and image tokens (B, L, V) through the fusion layers -> (B, T, D)."""
        mask, image_mask = key_mask(atts), key_mask(image_atts)
        for layer in self.encoder.layer[self.fusion_layer :]:
            text = layer(text, mask, image, image_mask)
        return text


class PredictionTransform(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Vocabulary logits; the decoder shares its weight with the word embeddings."""

    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.weight = word_embeddings.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class MaskedLMHead(nn.Module):
    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.predictions = Predictions(config, word_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class BertForMaskedLM(nn.Module):
    """`Bert` with the masked-language-modelling head tied to its word embeddings."""

    def __init__(self, config: TextConfig, vision_width: int):
        super().__init__()
        self.bert = Bert(config, vision_width)
        self.cls = MaskedLMHead(config, self.bert.embeddings.word_embeddings)
