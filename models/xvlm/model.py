"""XVLM (arXiv 2111.08276): CLIP vision transformer, BERT text and fusion encoder, pretraining losses, prunable view.

Shapes: B images, R regions, L = 1 + patches, T text tokens, V vision width, D text width, E embedding width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import load_weights
from models.parts.bert import Bert, BertForMaskedLM, Image, Projected, TextConfig
from models.parts.clip_vision import CLIPVisionTransformer, VisionConfig
from models.parts.losses import box_losses, contrastive_loss, gather_features, hard_negatives
from models.parts.similarity import head, normalised
from models.parts.sizes import check_sizes
from models.parts.tokenizer import WordPiece
from sparsity.errors import UserError
from sparsity.view import Output, Outputs, PrunableView

TEMPERATURES = (0.001, 0.5)
OBJECTIVES = ("itc", "itm", "mlm", "bbox")
TEXT = {"add_sep": False}  # template of captions: [CLS] x
REBUILT = ()  # state that a checkpoint need not have, since it is made anew
REGIONS = True  # the second source of calibration data has regions of images
KEPT_DENSE = ("vision_proj", "text_proj", "itm_head.*", "bbox_head.*", "text_encoder.cls.*")
IMAGE_FED = ("crossattention.self.key.weight", "crossattention.self.value.weight")  # their input is the image
POSITIONS = ("vision_encoder.pos_embed.weight",)  # interpolated when a checkpoint has another image size
HARMLESS = ("*.position_ids", "text_encoder.cls.predictions.bias")  # may be missing from or superfluous in a checkpoint


@dataclass(frozen=True)
class Config:
    """Sizes of XVLM; the defaults are the public 4M checkpoint's, 212 M parameters."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    temp: float = 0.07
    vocab: str = "data/vocab/bert_vocab.txt"
    max_tokens: int = 40

    def __post_init__(self):
        check_sizes(self)
        if self.max_tokens > self.text.max_positions:
            raise UserError(f"max_tokens must be at most {self.text.max_positions} positions, got {self.max_tokens!r}")


def mlp_head(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, out))


class ImageText(nn.Module):
    """Encoders, projections and ITM head of XVLM: what pretraining and retrieval share.

    text_encoder: holds the layers of `bert` in one way or the other.
    """

    def __init__(self, config: Config, text_encoder: nn.Module):
        super().__init__()
        self.config = config
        self.vision_encoder = CLIPVisionTransformer(config.vision)
        self.text_encoder = text_encoder
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(config.temp))
        self.itm_head = mlp_head(config.text.width, 2)

    @property
    def bert(self) -> Bert:
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self) -> "ImageText":
        """Random weights for training from scratch: N(0, 1 / (2 * inputs)) for layers, biases 0, norms 1.

        At BERT's width that is close to its 0.02; narrower models need more to begin to learn.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0.0, (2 * module.weight[0].numel()) ** -0.5)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for module in self.modules():  # last, since the vocabulary logits share the word embeddings
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.02)
        self.vision_encoder.class_embedding.normal_(0.0, 0.02)
        self.temp.fill_(self.config.temp)
        return self

    def on_step(self) -> None:
        """Called after each step of the optimizer; there is nothing that follows the weights."""

    # The parts, as calibration, losses and retrieval use them.

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> tokens (B, L, V), l2-normalised feature (B, E)."""
        tokens = self.vision_encoder(image)
        return tokens, self.image_feature(tokens)

    def encode_text(self, ids: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and padding mask (B, T) -> states of the text encoder (B, T, D), l2-normalised feature (B, E)."""
        states = self.bert.encode_text(ids, atts)
        return states, normalised(self.text_proj(states[:, 0]))

    def image_feature(self, tokens: Tensor) -> Tensor:
        return normalised(self.vision_proj(tokens[:, 0]))

    def project_image(self, tokens: Tensor) -> Projected:
        """Return what `fuse` and `match` read of image tokens (B, L, V), once for all texts that meet an image."""
        return self.bert.project(tokens)

    def fuse(self, states: Tensor, atts: Tensor, image: Image, image_atts: Tensor | None = None) -> Tensor:
        """Text states (B, T, D), image tokens (B, L, V) or what is projected of them -> fusion states (B, T, D)."""
        return self.bert.fuse(states, atts, image, image_atts)

    def match(self, states: Tensor, atts: Tensor, image: Image, image_atts: Tensor | None = None) -> Tensor:
        """ITM logits (B, 2) of text-image pairs, float32 under autocast; column 1 says that they match."""
        return head(self.itm_head, self.fuse(states, atts, image, image_atts)[:, 0])

    def pair_scores(self, logits: Tensor, similarity: Tensor) -> Tensor:
        """Score of pairs in retrieval, from the ITM logits (B, 2); the contrastive similarity (B,) does not count."""
        return logits[:, 1]

    def temperature(self) -> Tensor:
        """Return the temperature of the softmax over similarities, kept in its range."""
        if self.training:  # through .data: a second source's forward must not invalidate the first one's graph
            self.temp.data.clamp_(*TEMPERATURES)
        return self.temp.clamp(*TEMPERATURES)

    def matching_loss(
        self,
        states: Tensor,
        atts: Tensor,
        image: Tensor,
        image_atts: Tensor | None,
        negatives: tuple[Tensor, Tensor],
        own: Tensor | None = None,
    ) -> Tensor:
        """ITM: two-way cross-entropy over n pairs that match and 2 n that do not, in one pass of the fusion encoder.

        negatives: the image that is wrong for text i and the text that is wrong for image i, each (n,), n <= B. own:
        (n,), the pairs that match, by default the first n.
        """
        wrong_image, wrong_text = negatives
        own = torch.arange(len(wrong_image), device=states.device) if own is None else own
        texts, images = torch.cat([own, own, wrong_text]), torch.cat([own, wrong_image, own])
        image_atts = None if image_atts is None else image_atts[images]
        logits = self.match(states[texts], atts[texts], image[images], image_atts)
        return F.cross_entropy(logits.float(), (texts == images).long())


class XVLM(ImageText):
    """`model(batch)` returns the pretraining losses as a dict with "loss", their sum."""

    def __init__(self, config: Config):
        super().__init__(config, BertForMaskedLM(config.text, config.vision.width))
        self.bbox_head = mlp_head(config.text.width, 4)

    @property
    def bert(self) -> Bert:
        return self.text_encoder.bert

    def predict_masked(self, batch: dict, image: Tensor, image_atts: Tensor | None) -> Tensor:
        """Vocabulary logits (B, masks, vocab) at `masked_pos` of the masked text, seen with the image."""
        states = self.bert.encode_text(batch["text_ids_masked"], batch["text_atts"])
        states = self.fuse(states, batch["text_atts"], image, image_atts)
        positions = batch["masked_pos"].unsqueeze(-1).expand(-1, -1, states.shape[-1])
        return self.text_encoder.cls(states.gather(1, positions))

    def predict_box(self, states: Tensor, atts: Tensor, image: Tensor) -> Tensor:
        """Box (R, 4) as (cx, cy, w, h) in [0, 1] of what the text describes in the whole image."""
        return self.bbox_head(self.fuse(states, atts, image)[:, 0]).sigmoid()

    def encode_batch_image(self, batch: dict) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Image tokens for each text of the batch, their attention mask, and for regions the whole image's tokens."""
        if "idx_to_group_img" not in batch:
            return self.vision_encoder(batch["image"]), None, None
        owner, atts = batch["idx_to_group_img"], batch["image_atts"]
        regions, images = self.vision_encoder.forward_regions(batch["image"], owner, atts)
        return regions, atts, images[owner]

    def forward(
        self,
        batch: dict,
        *,
        objectives: Iterable[str] = OBJECTIVES,
        gather: bool = True,
        fused_pairs: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Pretraining losses of one batch: image-text pairs, or regions where it has `idx_to_group_img`.

        gather: features of all ranks enter ITC. fused_pairs: only the first so many pairs go through the costly fusion
        encoder (ITM, MLM, boxes), all where None. generator draws the ITM negatives. Boxes are only asked of regions;
        without any possible negative there is no "itm" in the result.
        """
        temp = self.temperature()
        image, image_atts, whole = self.encode_batch_image(batch)
        atts, ids = batch["text_atts"], batch.get("sample_ids")
        states, text_feat = self.encode_text(batch["text_ids"], atts)
        image_feat = self.image_feature(image)

        losses = {}
        if "itc" in objectives:
            collect = gather_features if gather else lambda x: x
            all_ids = None if ids is None else collect(ids)
            losses["itc"] = contrastive_loss(collect(image_feat), collect(text_feat), temp, all_ids)
        if "itm" in objectives:
            negatives = hard_negatives(image_feat, text_feat, temp, ids, generator=generator)
            if negatives is not None:
                negatives = negatives[0][:fused_pairs], negatives[1][:fused_pairs]
                losses["itm"] = self.matching_loss(states, atts, image, image_atts, negatives)
        fused = slice(fused_pairs)
        image, image_atts = image[fused], None if image_atts is None else image_atts[fused]
        if "mlm" in objectives:
            masked = {k: batch[k][fused] for k in ("text_ids_masked", "text_atts", "masked_pos")}
            logits, labels = self.predict_masked(masked, image, image_atts), batch["masked_ids"][fused]
            losses["mlm"] = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        if "bbox" in objectives and whole is not None:
            boxes = self.predict_box(states[fused], atts[fused], whole[fused]).float()
            targets, is_image = batch["target_bbox"][fused], batch["is_image"][fused]
            losses["bbox"], losses["giou"] = box_losses(boxes, targets, is_image)
        return {"loss": sum(losses.values()), **losses}


def build(config: Config, weights: str | Path | None = None) -> XVLM:
    """XVLM of these sizes with the weights of a file, or random ones."""
    model = XVLM(config)
    if weights is None:
        return model.initialise()
    load_weights(model, weights, positions=POSITIONS, ignored=HARMLESS)
    return model


def tokenizer(config: Config) -> WordPiece:
    return WordPiece(config.vocab)


def calibrate(model: XVLM, batch: dict) -> None:
    """One calibration pass: unmasked text, positive pairs, each encoder once; regions with their own image features."""
    image, image_atts, _ = model.encode_batch_image(batch)
    states = model.bert.encode_text(batch["text_ids"], batch["text_atts"])
    model.fuse(states, batch["text_atts"], image, image_atts)


def outputs(model: XVLM, batch: dict) -> Outputs:
    """Return those of `pair_outputs`; regions are seen as parts of their images."""
    image, image_atts, _ = model.encode_batch_image(batch)
    return pair_outputs(model, batch, image, image_atts)


def pair_outputs(model: ImageText, batch: dict, image: Tensor, image_atts: Tensor | None = None) -> Outputs:
    """Return the features of both towers, the fusion states of the pairs, and whether text i matches its own image and
    the image of text i + 1. image: tokens (B, L, V) of the images of the texts.
    """
    atts = batch["text_atts"]
    states, text_feature = model.encode_text(batch["text_ids"], atts)
    fused = model.fuse(states, atts, image, image_atts)
    other_atts = None if image_atts is None else image_atts.roll(-1, 0)
    return {
        "image": Output("embedding", model.image_feature(image)),
        "text": Output("embedding", text_feature),
        "fusion": Output("states", fused, real=atts.bool()),
        "match": Output("logits", head(model.itm_head, fused[:, 0])),
        "mismatch": Output("logits", model.match(states, atts, image.roll(-1, 0), other_atts)),
    }


def modality(config: Config, layers: str) -> Callable[[str], str]:
    """State-dict key -> group of the weight; `layers` is where the layers of BERT lie."""
    text_only = tuple(f"{layers}.{i}." for i in range(config.text.fusion_layer))

    def group_of(name: str) -> str:
        if name.startswith("vision_encoder."):
            return "vision"
        return "text" if name.startswith(text_only) else "fusion"

    return group_of


def prunable_view(model: XVLM) -> PrunableView:
    """The prunable weights of XVLM in three groups; projections and heads are kept dense."""

    def valid_tokens(name: str, batch: dict) -> Tensor | None:
        sees_image = name.startswith("vision_encoder.") or name.endswith(IMAGE_FED)
        return None if sees_image else batch["text_atts"]

    def loss(batch: dict, generator: torch.Generator | None = None) -> Tensor:
        return model(batch, objectives=("itc", "itm", "mlm"), gather=False, generator=generator)["loss"]

    return PrunableView(
        model,
        group_of=modality(model.config, "text_encoder.bert.encoder.layer"),
        keep_dense=KEPT_DENSE,
        forward=lambda batch: calibrate(model, batch),
        loss=loss,
        valid_tokens=valid_tokens,
        blocks=[*model.vision_encoder.encoder.layers, *model.bert.encoder.layer],
        outputs=outputs,
    )
