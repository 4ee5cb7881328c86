"""BLIP (arXiv 2201.12086): vision transformer, BERT text encoder and decoder that share weights, momentum copies and
feature queues, pretraining losses, prunable view.

Shapes: B images and texts, L = 1 + patches, T text tokens, V vision width, D text width, E embedding width, Q queue.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from models.blip.outputs import outputs
from models.blip.vision import VisionConfig, vision_transformer
from models.checkpoint import load_weights
from models.parts.bert import Bert, BertForMaskedLM, Image, Projected, TextConfig
from models.parts.losses import draw_negatives, gather_features
from models.parts.similarity import head, normalised, similarity, without_autocast
from models.parts.sizes import check_sizes
from models.parts.tokenizer import WordPiece
from sparsity.errors import UserError
from sparsity.view import PrunableView

Pair = tuple[Tensor, Tensor]  # of images and of texts, or the two ways between them
TEMPERATURES = (0.001, 0.5)
OBJECTIVES = ("itc", "itm", "lm")
TEXT = {"add_sep": True}  # template of captions: [CLS] x [SEP]
REGIONS = False  # the second source of calibration data has image-text pairs, as the first one
ADDED_TOKENS = 2  # [DEC], which begins what the decoder writes, and [ENC], first token of the image-grounded encoder
LABEL_SMOOTHING = 0.1
NEGATIVES_FLOOR = 1e-4
KEPT_DENSE = ("vision_proj", "text_proj", "itm_head", "*_m", "text_decoder.cls.*")
IMAGE_FED = ("crossattention.self.key.weight", "crossattention.self.value.weight")  # their input is the image
POSITIONS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
MOMENTUM = ("visual_encoder_m.*", "vision_proj_m.*", "text_encoder_m.*", "text_proj_m.*")
QUEUES = ("image_queue", "text_queue", "idx_queue")
REBUILT = (*MOMENTUM, *QUEUES, "queue_ptr")  # state that a checkpoint need not have, since it can be rebuilt
HARMLESS = ("*.position_ids",)  # may be missing from or superfluous in a checkpoint


def text_config() -> TextConfig:
    return TextConfig(vocab_size=30522 + ADDED_TOKENS, fusion_layer=0, token_types=False)


@dataclass(frozen=True)
class Config:
    """Sizes of BLIP; the defaults are the public 14M checkpoint's. The vocabulary counts [DEC] and [ENC]."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=text_config)
    embed_dim: int = 256
    temp: float = 0.07
    queue_size: int = 57600
    momentum: float = 0.995
    vocab: str = "data/vocab/bert_vocab.txt"
    max_tokens: int = 30

    def __post_init__(self):
        check_sizes(self)
        if self.max_tokens > self.text.max_positions:
            raise UserError(f"max_tokens must be at most {self.text.max_positions} positions, got {self.max_tokens!r}")
        if self.text.fusion_layer or self.text.token_types:
            raise UserError("text must have fusion_layer: 0 and token_types: false, as every layer of BLIP's does")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"momentum must be a fraction between 0 and 1, got {self.momentum!r}")


def started(ids: Tensor, token: int) -> Tensor:
    """Ids (B, T) with this first token."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Random weights of the layers, for training from scratch."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(0.0, (2 * module.weight[0].numel()) ** -0.5)
            module.bias.zero_()
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for module in model.modules():  # last, since the vocabulary logits share the word embeddings
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.02)


def tie(encoder: Bert, decoder: Bert) -> None:
    """Give the decoder the encoder's parameters, but for self-attention."""
    own = dict(decoder.named_parameters())
    for name, parameter in encoder.named_parameters():
        if ".attention." not in name:
            assert own[name].shape == parameter.shape
            owner, _, key = name.rpartition(".")
            setattr(decoder.get_submodule(owner), key, parameter)


class ImageText(nn.Module):
    """Encoders, projections and ITM head of BLIP with their momentum copies and queues: what pretraining and retrieval
    share.
    """

    pointer = "queue_ptr"  # names the buffer that says where the oldest features of the queues are

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.decoder_start, self.encoder_start = config.text.vocab_size - 2, config.text.vocab_size - 1
        width = config.vision.width
        self.temp = nn.Parameter(torch.tensor(config.temp))
        self.register_queues()
        self.visual_encoder = vision_transformer(config.vision)
        self.text_encoder = Bert(config.text, width)
        self.vision_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        self.visual_encoder_m = vision_transformer(config.vision)
        self.vision_proj_m = nn.Linear(width, config.embed_dim)
        self.text_encoder_m = Bert(config.text, width)
        self.text_proj_m = nn.Linear(config.text.width, config.embed_dim)
        self.reset_momentum()
        self.reset_queues()

    def register_queues(self) -> None:
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.empty(self.config.embed_dim, self.config.queue_size))
        self.register_buffer(self.pointer, torch.zeros(1, dtype=torch.long))

    @property
    def pairs_with_copies(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """(module, its momentum copy)."""
        return (
            (self.visual_encoder, self.visual_encoder_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_encoder, self.text_encoder_m),
            (self.text_proj, self.text_proj_m),
        )

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Momentum copies as the weights are now; to be called again after a mask was applied."""
        for module, copy in self.pairs_with_copies:
            copy.load_state_dict(module.state_dict())
            copy.requires_grad_(False)

    @torch.no_grad()
    def reset_queues(self) -> None:
        """Random directions, from a generator of their own, and the pointer at the start."""
        generator = torch.Generator().manual_seed(0)
        for queue in (self.image_queue, self.text_queue):
            queue.copy_(F.normalize(torch.randn(queue.shape, generator=generator), dim=0))
        self.get_buffer(self.pointer).zero_()

    def on_step(self) -> None:
        """Called after each step of the optimizer: the momentum copies follow, however many batches it took."""
        self.update_momentum()

    @torch.no_grad()
    def update_momentum(self) -> None:
        """copy = momentum * copy + (1 - momentum) * weight."""
        for module, copy in self.pairs_with_copies:
            weights = dict(module.named_parameters())  # with what is learned beside them, of which there is no copy
            for name, average in copy.named_parameters():
                average.mul_(self.config.momentum).add_(weights[name], alpha=1 - self.config.momentum)

    @torch.no_grad()
    def enqueue(self, **features: Tensor) -> None:
        """Rows (B, ...) in place of the oldest columns of the queues of these names (..., Q), round and round."""
        pointer, size = self.get_buffer(self.pointer), self.config.queue_size
        count = min(size, *(len(rows) for rows in features.values()))
        slots = (int(pointer) + torch.arange(count, device=pointer.device)) % size
        for name, rows in features.items():
            queue = self.get_buffer(name)
            queue[:, slots] = rows[:count].reshape(count, -1).t().to(queue.dtype)
        pointer.fill_((int(pointer) + count) % size)

    @torch.no_grad()
    def initialise(self) -> Self:
        """Random weights for training from scratch: N(0, 1 / (2 * inputs)) for layers, biases 0, norms 1.

        At BERT's width that is close to its 0.02; narrower models need more to begin to learn.
        """
        initialise(self)
        self.visual_encoder.cls_token.normal_(0.0, 0.02)
        self.visual_encoder.pos_embed.normal_(0.0, 0.02)
        self.temp.fill_(self.config.temp)
        self.reset_momentum()
        return self

    # The parts, as calibration, losses and retrieval use them.

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> tokens (B, L, V), l2-normalised feature (B, E)."""
        tokens = self.visual_encoder.forward_features(image)
        return tokens, normalised(self.vision_proj(tokens[:, 0]))

    def encode_text(self, ids: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and padding mask (B, T) -> ids for `match` (B, T), l2-normalised feature (B, E)."""
        states = self.text_encoder(ids, atts, None)
        return started(ids, self.encoder_start), normalised(self.text_proj(states[:, 0]))

    def project_image(self, tokens: Tensor) -> Projected:
        """Return what `match` reads of image tokens (B, L, V); computed once for all texts that meet an image."""
        return self.text_encoder.project(tokens)

    def match(self, ids: Tensor, atts: Tensor, image: Image) -> Tensor:
        """ITM logits (B, 2) of text-image pairs, float32 under autocast; column 1 says that they match.

        ids: begin with [ENC]. image: tokens (B, L, V), or what is projected of them.
        """
        return head(self.itm_head, self.text_encoder(ids, atts, image)[:, 0])

    def pair_scores(self, logits: Tensor, similarity: Tensor) -> Tensor:
        """Score of pairs in retrieval, from the ITM logits (B, 2) and the contrastive similarity (B,)."""
        return logits[:, 1] + similarity

    @torch.no_grad()
    def momentum_features(self, image: Tensor, ids: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        """l2-normalised features (B, E) of images and texts by the momentum copies."""
        tokens, states = self.visual_encoder_m.forward_features(image), self.text_encoder_m(ids, atts, None)
        return normalised(self.vision_proj_m(tokens[:, 0])), normalised(self.text_proj_m(states[:, 0]))

    def temperature(self) -> Tensor:
        """Return the temperature of the softmax over similarities, kept in its range."""
        if self.training:  # through .data: a second source's forward must not invalidate the first one's graph
            self.temp.data.clamp_(*TEMPERATURES)
        return self.temp.clamp(*TEMPERATURES)

    def similarities(self, features: Pair, keys: Pair, temp: Tensor) -> Pair:
        """Return the similarities over temperature (B, B + Q), images to texts and texts to images: keys, then queues.

        features, keys: of images and of texts, (B, E) each.
        """
        (image, text), (image_keys, text_keys) = features, keys
        texts, images = torch.cat([text_keys, self.text_queue.t()]), torch.cat([image_keys, self.image_queue.t()])
        return similarity(image, texts, temp), similarity(text, images, temp)

    def contrastive_loss(self, similarities: Pair, keys: Pair, temp: Tensor, targets: Tensor, alpha: float) -> Tensor:
        """ITC against batch and queues (ALBEF, arXiv 2107.07651, eq. 6): the targets, and by `alpha` the softmax of the
        momentum copies' similarities.

        similarities: of the features, as `similarities` gives them. keys: of the copies. targets: (B, B + Q).
        """
        soft = self.soft_targets(keys, temp, targets, alpha) if alpha else (targets, targets)
        with without_autocast(targets.device):
            return sum(F.cross_entropy(s, target) for s, target in zip(similarities, soft, strict=True)) / 2

    @torch.no_grad()
    def soft_targets(self, keys: Pair, temp: Tensor, targets: Tensor, alpha: float) -> Pair:
        """Targets of both ways (B, B + Q): `alpha` of the softmax of the copies' similarities, the rest `targets`."""
        with without_autocast(targets.device):
            teachers = self.similarities(keys, keys, temp)
            return tuple(alpha * teacher.softmax(1) + (1 - alpha) * targets for teacher in teachers)

    def matching_loss(
        self, ids: Tensor, atts: Tensor, image: Tensor, negatives: tuple[Tensor, Tensor], own: Tensor | None = None
    ) -> Tensor:
        """ITM: two-way cross-entropy over n pairs that match and 2 n that do not, in one pass of the encoder.

        ids: begin with [ENC]. negatives: the image that is wrong for text i and the text that is wrong for image i,
        each (n,), n <= B. own: (n,), the pairs that match, by default the first n.
        """
        wrong_image, wrong_text = negatives
        own = torch.arange(len(wrong_image), device=ids.device) if own is None else own
        texts, images = torch.cat([own, own, wrong_text]), torch.cat([own, wrong_image, own])
        logits = self.match(ids[texts], atts[texts], image[images])
        return F.cross_entropy(logits.float(), (texts == images).long())


class BLIP(ImageText):
    """`model(batch)` returns the pretraining losses as a dict with "loss", their sum."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.text_decoder = BertForMaskedLM(config.text, config.vision.width, causal=True)
        tie(self.text_encoder, self.text_decoder.bert)
        self.text_decoder.cls.predictions.decoder.weight = self.text_encoder.embeddings.word_embeddings.weight

    def decode(self, ids: Tensor, atts: Tensor, image: Tensor) -> Tensor:
        """Vocabulary logits (B, T, vocab) of the token after each; ids begin with [DEC]."""
        return self.text_decoder.cls(self.text_decoder.bert(ids, atts, image))

    def forward(
        self,
        batch: dict,
        *,
        objectives: Iterable[str] = OBJECTIVES,
        gather: bool = True,
        fused_pairs: int | None = None,
        generator: torch.Generator | None = None,
        alpha: float = 0.0,
        frozen: bool = False,
    ) -> dict[str, Tensor]:
        """Pretraining losses of one batch of image-text pairs.

        gather: features of all ranks enter the queues. fused_pairs: only the first so many pairs go through the
        image-grounded encoder and the decoder (ITM, LM), all where None. generator draws the ITM negatives. alpha:
        share of the momentum copies' similarities in the targets of ITC. frozen: the queues stay as they are. Without
        any possible negative there is no "itm" in the result. The copies move in `on_step`, not here.
        """
        temp = self.temperature()
        ids, atts = batch["text_ids"], batch["text_atts"]
        image, image_feat = self.encode_image(batch["image"])
        grounded, text_feat = self.encode_text(ids, atts)
        keys = self.momentum_features(batch["image"], ids, atts)
        i2t, t2i = self.similarities((image_feat, text_feat), keys, temp)

        losses = {}
        if "itc" in objectives:
            losses["itc"] = self.contrastive_loss((i2t, t2i), keys, temp, torch.eye(*i2t.shape).to(i2t), alpha)
        if not frozen:
            image_keys, text_keys = map(gather_features, keys) if gather else keys
            self.enqueue(image_queue=image_keys, text_queue=text_keys)
        fused = slice(fused_pairs)
        if "itm" in objectives:
            own = len(ids)
            negatives = draw_negatives(t2i[:, :own], i2t[:, :own], floor=NEGATIVES_FLOOR, generator=generator)
            if negatives is not None:
                losses["itm"] = self.matching_loss(grounded, atts, image, (negatives[0][fused], negatives[1][fused]))
        if "lm" in objectives:
            losses["lm"] = self.language_loss(ids[fused], atts[fused], image[fused])
        return {"loss": sum(losses.values()), **losses}

    def language_loss(self, ids: Tensor, atts: Tensor, image: Tensor) -> Tensor:
        """LM: cross-entropy with label smoothing of each token after the first, the mean over the real ones."""
        ids = started(ids, self.decoder_start)
        logits, labels = self.decode(ids, atts, image)[:, :-1], ids.masked_fill(atts == 0, -100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=LABEL_SMOOTHING)


def build(config: Config, weights: str | Path | None = None) -> BLIP:
    """BLIP of these sizes with the weights of a file, or random ones.

    A file without momentum copies gets copies of its weights; one without queues, fresh queues.
    """
    model = BLIP(config)
    return model.initialise() if weights is None else load(model, weights, HARMLESS)


def load(model: ImageText, weights: str | Path, ignored: Sequence[str]) -> ImageText:
    """The weights of a file into a model; where momentum copies are not among them, they are made anew."""
    optional = (*MOMENTUM, *QUEUES, model.pointer)
    missing = load_weights(model, weights, positions=POSITIONS, ignored=ignored, optional=optional)
    if any(not name.endswith(QUEUES) and name != model.pointer for name in missing):
        model.reset_momentum()
    return model


def tokenizer(config: Config) -> WordPiece:
    return WordPiece(config.vocab)


def calibrate(model: BLIP, batch: dict) -> None:
    """One calibration pass: visual encoder, image-grounded text encoder and text decoder once each."""
    image = model.visual_encoder.forward_features(batch["image"])
    ids, atts = batch["text_ids"], batch["text_atts"]
    model.text_encoder(started(ids, model.encoder_start), atts, image)
    model.text_decoder.bert(started(ids, model.decoder_start), atts, image)


def calibrate_in_full(model: BLIP, batch: dict) -> None:
    """The same, and the text encoder without an image, whose features retrieval compares."""
    model.text_encoder(batch["text_ids"], batch["text_atts"], None)
    calibrate(model, batch)


def group_of(name: str) -> str:
    return "vision" if name.startswith("visual_encoder.") else "text"


def prunable_view(model: BLIP) -> PrunableView:
    """The prunable weights of BLIP in two groups, tied ones once; projections, heads and momentum copies are not.

    The loss moves no momentum copy. On one device the queues take its features in, as the published code has it; on
    several they are frozen, since ranks that move them apart would not be one model.
    """
    layers = zip(model.text_encoder.encoder.layer, model.text_decoder.bert.encoder.layer, strict=True)
    both = [nn.ModuleList(pair) for pair in layers]  # what they share is calibrated on both uses

    def valid_tokens(name: str, batch: dict) -> Tensor | None:
        sees_image = name.startswith("visual_encoder.") or name.endswith(IMAGE_FED)
        return None if sees_image else batch["text_atts"]

    def loss(batch: dict, generator: torch.Generator | None = None) -> Any:
        ranks = distributed.is_initialized() and distributed.get_world_size() > 1
        return model(batch, gather=False, generator=generator, frozen=ranks)["loss"]

    return PrunableView(
        model,
        group_of=group_of,
        keep_dense=KEPT_DENSE,
        forward=lambda batch: calibrate(model, batch),
        in_full=lambda batch: calibrate_in_full(model, batch),
        loss=loss,
        valid_tokens=valid_tokens,
        blocks=[*model.visual_encoder.blocks, *both],
        outputs=outputs,
    )
