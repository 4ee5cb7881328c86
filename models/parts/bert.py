"""BERT encoder whose upper layers may look at an image, under the key names of the public BERT and XVLM checkpoints.

Post-norm layers, exact GELU. Attention goes through `scaled_dot_product_attention`: no attention matrix is kept.
Shapes: B samples, T text tokens, L image tokens, D text width, V vision width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parts.sizes import check_sizes
from sparsity.errors import UserError

Keyed = tuple[Tensor, Tensor]  # keys and values of what is attended to, each (B, H, L, D / H)
Projected = list[Keyed]  # of an image, for each layer that looks at it
Image = Tensor | Projected  # tokens (B, L, V), or what is projected of them


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
    token_types: bool = True  # BLIP's BERT has no token-type embeddings
    dropout: float = 0.1
    eps: float = 1e-12

    def __post_init__(self):
        check_sizes(self, "fusion_layer")
        if self.dropout >= 1:
            raise UserError(f"dropout must be from 0 to below 1, got {self.dropout!r}")
        if self.width % self.heads:
            raise UserError(f"width must be a multiple of heads = {self.heads}, got {self.width!r}")
        if not 0 <= self.fusion_layer <= self.layers:
            raise UserError(f"fusion_layer must be from 0 to layers = {self.layers}, got {self.fusion_layer!r}")


class Embeddings(nn.Module):
    """Word + position (+ token-type) embeddings, LayerNorm, dropout."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_types = config.token_types
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        if config.token_types:
            self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("position_ids", torch.arange(config.max_positions).unsqueeze(0))

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """Ids (B, T), of which the first is the token at position `start` -> (B, T, D)."""
        positions = self.position_ids[:, start : start + ids.shape[1]]
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        if self.token_types:
            x = x + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x))


class SelfAttention(nn.Module):
    """Multi-head attention of `x` over `context`, whose width is `context_width` (over itself when None)."""

    def __init__(self, config: TextConfig, context_width: int):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | Keyed | None) -> Tensor:
        keyed = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        return self.attend(self.queries(x), *keyed, mask)

    # In parts, so that generation and re-ranking can keep the keys and values: each (B, H, T or L, D / H).

    def queries(self, x: Tensor) -> Tensor:
        return self._heads(self.query(x))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.key(source)), self._heads(self.value(source))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


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

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | Keyed | None = None) -> Tensor:
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

    def forward(self, x: Tensor, mask: Tensor, image: Tensor | Keyed | None, image_mask: Tensor | None) -> Tensor:
        """x: (B, T, D). image: (B, L, V), or (B / n, L, V), where n texts one after the other share a row; or its keys
        and values.
        """
        x = self.attention(x, mask)
        if image is not None:
            # Texts that share a row are queries of one sequence; without any text there are no rows either.
            rows = (image[0] if isinstance(image, tuple) else image).shape[0]
            queries = x.reshape(rows, x.shape[0] // max(1, rows) * x.shape[1], x.shape[2])
            x = self.crossattention(queries, image_mask, image).reshape(x.shape)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config: TextConfig, vision_width: int):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, vision_width if i >= config.fusion_layer else None) for i in range(config.layers)
        )


def key_mask(atts: Tensor | None, causal: bool = False) -> Tensor | None:
    """(B, T) with 1 at the tokens to attend to -> boolean (B, 1, 1, T), as scaled_dot_product_attention takes it.

    causal: no token sees a later one, (B, 1, T, T).
    """
    if atts is None:
        return None
    mask = atts.bool()[:, None, None, :]
    length = atts.shape[1]
    return mask & torch.ones(length, length, dtype=torch.bool, device=atts.device).tril() if causal else mask


class Bert(nn.Module):
    """Layers below `fusion_layer` encode text; those from it on fuse text with image tokens (or do without)."""

    def __init__(self, config: TextConfig, vision_width: int, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.fusion_layer = config.fusion_layer
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, vision_width)

    def encode_text(self, ids: Tensor, atts: Tensor) -> Tensor:
        """Token ids and padding mask, both (B, T), through the text layers -> (B, T, D)."""
        x, mask = self.embeddings(ids), key_mask(atts, self.causal)
        for layer in self.encoder.layer[: self.fusion_layer]:
            x = layer(x, mask, None, None)
        return x

    def project(self, image: Tensor) -> Projected:
        """Image tokens (B, L, V) -> their keys and values in each fusion layer, which `fuse` takes in their place."""
        return [layer.crossattention.self.keys_values(image) for layer in self.encoder.layer[self.fusion_layer :]]

    def fuse(self, text: Tensor, atts: Tensor, image: Image | None, image_atts: Tensor | None = None) -> Tensor:
        """Text states (B, T, D) and image tokens (B, L, V) through the fusion layers -> (B, T, D).

        Without an image the cross-attention is left out.
        """
        mask, image_mask = key_mask(atts, self.causal), key_mask(image_atts)
        layers = self.encoder.layer[self.fusion_layer :]
        images = image if isinstance(image, list) else [image] * len(layers)
        for layer, seen in zip(layers, images, strict=True):
            text = layer(text, mask, seen, image_mask)
        return text

    def forward(self, ids: Tensor, atts: Tensor, image: Image | None, image_atts: Tensor | None = None) -> Tensor:
        """All layers: `encode_text`, then `fuse`."""
        return self.fuse(self.encode_text(ids, atts), atts, image, image_atts)


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
    """`Bert` with the head of masked or, where `causal`, of plain language modelling, tied to its word embeddings."""

    def __init__(self, config: TextConfig, vision_width: int, causal: bool = False):
        super().__init__()
        self.bert = Bert(config, vision_width, causal)
        self.cls = MaskedLMHead(config, self.bert.embeddings.word_embeddings)
