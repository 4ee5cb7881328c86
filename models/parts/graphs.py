"""The parts of a model that are exported one by one, as modules from tensors to tensors: a classifier, the towers of a
vision-language model and what matches pairs, the step of a decoder that writes captions or answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.parts.captioning import Captioner
from models.parts.similarity import head
from models.parts.vqa import Answering
from sparsity.errors import UserError
from sparsity.view import bare

IMAGE = "image"
UNKNOWN = "it is not known which parts of this model are exported: give --formats dense,packed"
_EXAMPLES = 2  # of which a graph is traced: one would be taken for a size that never changes


@dataclass(frozen=True)
class Graph:
    """One part. inputs: name -> example, in the order of the module's arguments; the first dimension of each is the
    batch. outputs: names. lengths: inputs whose second dimension, the number of tokens, may differ too. highest: input
    of integers -> ids that it may hold are below that. longest: most tokens of `lengths`.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    lengths: tuple[str, ...] = ()
    highest: Mapping[str, int] = field(default_factory=dict)
    longest: int = 512

    def random(self, batch: int, seed: int, length: int | None = None) -> dict[str, Tensor]:
        """Return other inputs of this size, of texts of this length where it may differ: normal numbers, ids, and masks
        as they are.
        """
        generator, drawn = torch.Generator().manual_seed(seed), {}
        for name, example in self.inputs.items():
            cut = example[:, :length] if length and name in self.lengths else example
            drawn[name] = self._random(name, cut, batch, generator)
        return drawn

    def _random(self, name: str, example: Tensor, batch: int, generator: torch.Generator) -> Tensor:
        shape = (batch, *example.shape[1:])
        if example.is_floating_point():
            return torch.randn(shape, generator=generator).to(example)
        if name in self.highest:
            return torch.randint(1, self.highest[name], shape, generator=generator).to(example)
        return example[:1].expand(shape).contiguous()


class _Vision(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_image(image)


class _Text(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_text(ids, atts)


class _Match(nn.Module):
    """Logits (B, 2) of pairs of a text and an image, from what the two towers give."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, states: Tensor, atts: Tensor, tokens: Tensor) -> Tensor:
        return self.model.match(states, atts, tokens)


class _Classify(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.classify(image)


class _Plain(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


class _Step(nn.Module):
    """Logits (B, vocab) of the token that follows the ids (B, T) of a caption, from image tokens (B, L, V)."""

    def __init__(self, model: Captioner):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, tokens: Tensor) -> Tensor:
        decoder = self.model.text_decoder
        states = decoder.bert(self.model.started(ids), torch.ones_like(ids), tokens)
        return head(decoder.cls, states[:, -1])


class _Features(nn.Module):
    """A tower of a model of transformers by its own function, whose result is a tensor or has it pooled."""

    def __init__(self, model: Any, text: bool):
        super().__init__()
        self.model, self.text = model, text

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.text:
            found = self.model.get_text_features(input_ids=inputs[0], attention_mask=inputs[1])
        else:
            found = self.model.get_image_features(pixel_values=inputs[0])
        found = found if isinstance(found, Tensor) else found.pooler_output
        return found if isinstance(found, Tensor) else torch.stack(tuple(found))


class _Projected(nn.Module):
    """Image tokens as the language model of LLaVA reads them, (B, patches, D)."""

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.layer = model.config.vision_feature_layer
        self.first = int(model.config.vision_feature_select_strategy != "full")  # without the class token

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(states[:, self.first :])


class _Embed(nn.Module):
    """Embeddings (B, T, D) of ids; those of image tokens give way to the image's."""

    def __init__(self, model: Any):
        super().__init__()
        self.embed = model.get_input_embeddings()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


class _Language(nn.Module):
    """Logits (B, T, vocab) of a language model, from embeddings (B, T, D)."""

    def __init__(self, model: Any):
        super().__init__()
        self.language, self.lm_head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.language(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
        return self.lm_head(found.last_hidden_state)


def graphs_of(model: nn.Module, side: int = 0) -> list[Graph]:
    """Return the parts of a model that are exported. side: of the images of a captioning model. UserError for a model
    of which none is known.
    """
    model = bare(model)
    if isinstance(model, Captioner):
        return _captioning(model, side)
    if isinstance(model, Answering):
        return _answering(model)
    kind, config = type(model), getattr(model, "config", None)
    own = {name for each in kind.__mro__ for name in vars(each)}
    if {"encode_image", "encode_text"} <= own and not kind.__module__.startswith("transformers."):
        return _towers(model)
    if "classify" in own:
        return [Graph("classifier", _Classify(model), _images(model.config.image_size), ("logits",))]
    if kind.__module__.startswith("timm."):
        side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index, union-attr]
        patches = getattr(model, "patch_embed", None)
        side = patches.img_size[0] if getattr(patches, "img_size", None) else side
        return [Graph("classifier", _Plain(model), _images(side), ("logits",))]
    if kind.__module__.startswith("transformers."):
        return _of_transformers(model, config, own)
    raise UserError(f"{kind.__name__}: {UNKNOWN}")


def _images(side: int, name: str = IMAGE) -> dict[str, Tensor]:
    return {name: torch.randn(_EXAMPLES, 3, side, side, generator=torch.Generator().manual_seed(0))}


def _texts(length: int, highest: int) -> dict[str, Tensor]:
    ids = torch.randint(1, highest, (_EXAMPLES, length), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "atts": torch.ones_like(ids)}


@torch.no_grad()
def _towers(model: Any) -> list[Graph]:
    """Both towers, and what matches pairs of what they give: states of texts, or ids (BLIP), and image tokens."""
    config, device = model.eval().config, next(model.parameters()).device
    words, images = config.text.vocab_size, _images(config.vision.image_size)
    texts = _texts(config.max_tokens, words)
    states, _ = model.encode_text(texts["ids"].to(device), texts["atts"].to(device))
    tokens, _ = model.encode_image(images[IMAGE].to(device))
    pairs = {"states": states.cpu(), "atts": texts["atts"], "tokens": tokens.cpu()}
    highest = {} if states.is_floating_point() else {"states": words}
    return [
        Graph("vision", _Vision(model), images, ("tokens", "feature")),
        Graph("text", _Text(model), texts, ("states", "feature"), lengths=("ids", "atts"), highest={"ids": words}),
        Graph("match", _Match(model), pairs, ("logits",), lengths=("states", "atts"), highest=highest),
    ]


class _Tokens(nn.Module):
    def __init__(self, model: Captioner | Answering):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)


@torch.no_grad()
def _captioning(model: Any, side: int) -> list[Graph]:
    words = model.text_decoder.bert.embeddings.word_embeddings.num_embeddings
    images = _images(side)
    tokens = model.eval().encode_image(images[IMAGE])
    step = {"ids": _texts(5, words)["ids"], "tokens": tokens}
    return [
        Graph("vision", _Tokens(model), images, ("tokens",)),
        Graph("step", _Step(model), step, ("logits",), lengths=("ids",), highest={"ids": words}),
    ]


class _Ask(nn.Module):
    """States (B, T, D) of questions, from image tokens (B, L, V), ids and padding mask (B, T)."""

    def __init__(self, model: Answering):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, ids: Tensor, atts: Tensor) -> Tensor:
        return self.model.ask(tokens, ids, atts)


class _Answer(nn.Module):
    """Logits (B, vocab) of the token that follows the ids (B, A) of an answer, from the states of its question."""

    def __init__(self, model: Answering):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, states: Tensor, atts: Tensor) -> Tensor:
        decoder = self.model.text_decoder
        hidden = decoder.bert(self.model.begun(ids), torch.ones_like(ids), states, atts)
        return head(decoder.cls, hidden[:, -1])


@torch.no_grad()
def _answering(model: Any) -> list[Graph]:
    config = model.eval().config
    words, images = config.text.vocab_size, _images(config.vision.image_size)
    tokens, question = model.encode_image(images[IMAGE]), _texts(config.max_tokens, words)
    states = model.ask(tokens, question["ids"], question["atts"])
    answer = {"ids": _texts(5, words)["ids"], "states": states, "atts": question["atts"]}
    return [
        Graph("vision", _Tokens(model), images, ("tokens",)),
        Graph("question", _Ask(model), {"tokens": tokens, **question}, ("states",), highest={"ids": words}),
        Graph("step", _Answer(model), answer, ("logits",), lengths=("ids",), highest={"ids": words}),
    ]


def _of_transformers(model: Any, config: Any, own: set[str]) -> list[Graph]:
    vision, text = getattr(config, "vision_config", None), getattr(config, "text_config", None)
    if vision is None:
        if getattr(config, "image_size", None) is None or model.main_input_name != "pixel_values":
            raise UserError(f"{type(model).__name__}: {UNKNOWN}")
        return [Graph("classifier", _Logits(model), _images(config.image_size, "pixel_values"), ("logits",))]
    images, words = _images(vision.image_size, "pixel_values"), text.vocab_size
    ids = torch.randint(3, min(words, 90), (_EXAMPLES, 8), generator=torch.Generator().manual_seed(0))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if {"get_image_features", "get_text_features"} <= own:
        longest = getattr(text, "max_position_embeddings", 512)
        return [
            Graph("vision", _Features(model, False), images, ("feature",)),
            Graph("text", _Features(model, True), texts, ("feature",), (*texts,), {"input_ids": words}, longest),
        ]
    if type(model).__name__ != "LlavaForConditionalGeneration" or not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{type(model).__name__}: {UNKNOWN}")
    embeddings = torch.randn(*ids.shape, text.hidden_size, generator=torch.Generator().manual_seed(0))
    step = {"inputs_embeds": embeddings, "attention_mask": texts["attention_mask"]}
    return [
        Graph("vision", _Projected(model), images, ("tokens",)),
        Graph("embed", _Embed(model), {"input_ids": ids}, ("embeddings",), ("input_ids",), {"input_ids": words}),
        Graph("step", _Language(model), step, ("logits",), ("inputs_embeds", "attention_mask")),
    ]


class _Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits
