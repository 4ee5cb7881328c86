"""Texts about images by transformers' `generate`: a causal `Bert` as the library wants a model, with key-value cache.

Shapes: B images, K beams of each, L image tokens, V vision width, T new tokens, D text width.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from models.parts.bert import Attention, Bert, BertForMaskedLM, key_mask
from models.parts.similarity import head


class ImageDecoder(PreTrainedModel, GenerationMixin):
    """`decoder` while it writes about `image`, tokens (B, L, V); made anew for each batch of images.

    Keys and values of the image are computed here, once for all its beams and tokens; those of the text are in the
    cache that `generate` reorders.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, decoder: BertForMaskedLM, image: Tensor):
        layers, fused = decoder.bert.encoder.layer, decoder.bert.fusion_layer
        words = decoder.bert.embeddings.word_embeddings.num_embeddings
        super().__init__(PretrainedConfig(num_hidden_layers=len(layers), vocab_size=words))
        self.decoder = decoder
        self.images = len(image)
        self.image = [None] * fused + decoder.bert.project(image)

    def forward(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits (B * K, 1, vocab) of the token after the last, from ids (B * K, T) that follow those of the cache.

        The cache is filled in place; `generate` keeps it.
        """
        last = self._states(self.decoder.bert, input_ids, DynamicCache() if cache is None else cache)[:, -1:]
        return CausalLMOutputWithPast(logits=head(self.decoder.cls, last))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Cache | None = None, past_key_values: Cache | None = None, **_: object
    ) -> dict[str, object]:
        """The tokens that the cache does not have yet; transformers before 5.24 calls the cache `past_key_values`."""
        cache = past_key_values if cache is None else cache
        known = 0 if cache is None else cache.get_seq_length()
        return {"input_ids": input_ids[:, known:], "cache": cache}

    def _states(self, bert: Bert, ids: Tensor, cache: Cache) -> Tensor:
        """States (B * K, T, D) of the new tokens, whose keys and values go to the cache."""
        start, length = cache.get_seq_length(), ids.shape[1]
        mask = key_mask(ids.new_ones(1, start + length), causal=True)[:, :, start:]
        x = bert.embeddings(ids, start)
        for i, layer in enumerate(bert.encoder.layer):
            own = layer.attention
            x = attend(own, x, *cache.update(*own.self.keys_values(x), i), mask)
            if self.image[i] is not None:
                beams = x.reshape(self.images, -1, x.shape[-1])  # (B, K * T, D): all that looks at one image
                x = attend(layer.crossattention, beams, *self.image[i], None).view_as(x)
            x = layer.output(layer.intermediate(x), x)
        return x


def attend(attention: Attention, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` of x (..., T, D) over keys and values that are there already."""
    return attention.output(attention.self.attend(attention.self.queries(x), keys, values, mask), x)


@torch.no_grad()
def generate(
    decoder: BertForMaskedLM,
    image: Tensor,
    prompt: Tensor,
    *,
    end: int,
    pad: int,
    num_beams: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    **options: object,
) -> Tensor:
    """Ids (B, at most `max_length`) of a text for each image, (B, L, V), by beam search; greedy with one beam.

    decoder: in evaluation mode. prompt: ids (1, T) that every text begins with; lengths count them. end: id that ends a
    text, `pad` follows it. options: of transformers' `generate`, as `repetition_penalty`, or `use_cache`, which changes
    the speed only.
    """
    limits = {"max_length": max_length, "min_length": min_length, "eos_token_id": end, "pad_token_id": pad}
    ids = prompt.to(image.device).expand(len(image), -1)
    return ImageDecoder(decoder, image).generate(ids, num_beams=num_beams, do_sample=False, **limits, **options)
