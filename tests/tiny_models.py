"""Tiny random models of timm and transformers, and processors that need no file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 98
VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
TIMM = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4, "num_classes": 5},
    ),
    "eva": ("eva02_base_patch14_448", {**VIT, "img_size": 28}),
    "eva_giant": ("eva_giant_patch14_224", {**VIT, "img_size": 28}),  # these call no layer for query, key and value
    "beit": ("beit_base_patch16_224", VIT),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 32, "depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 4, "num_classes": 5},
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "num_classes": 5}),
}


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def blip2() -> nn.Module:
    text = {**TEXT, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}
    qformer = {**TEXT, "encoder_hidden_size": 32}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **TEXT, "num_key_value_heads": 2},
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=97,
        vision_end_token_id=96,
        video_token_id=95,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def idefics3(smol: bool = False) -> nn.Module:
    kind = "SmolVLM" if smol else "Idefics3"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION,
        text_config={"model_type": "llama", **TEXT, "num_key_value_heads": 2},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "gemma", **TEXT, "num_key_value_heads": 1, "head_dim": 16},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


BART = {
    **{key: TEXT[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "pad_token_id")},
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "eos_token_id": 2, "decoder_start_token_id": 2},
}


def florence2() -> nn.Module:
    stages = {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    vision = {"depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4}
    vision |= {"projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 8, **stages}
    config = transformers.Florence2Config(
        text_config={"model_type": "bart", **BART}, vision_config=vision, image_token_id=IMAGE_TOKEN
    )
    return transformers.Florence2ForConditionalGeneration(config)


def whisper() -> nn.Module:
    sizes = {key: value for key, value in BART.items() if key != "max_position_embeddings"}
    heard = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **heard))


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "siglip": siglip,
    "blip2": blip2,
    "llava": llava,
    "qwen": qwen,
    "idefics3": idefics3,
    "smolvlm": partial(idefics3, smol=True),
    "paligemma": paligemma,
    "florence2": florence2,
    "whisper": whisper,
}


def words(ids: list[list[int]]) -> dict[str, Tensor]:
    """Texts of several lengths, padded to the right by 0."""
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": real}


def batch_for(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Two images with texts of different length, as the processor of that model lays them out, with what its loss
    needs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    if kind == "whisper":
        heard = torch.randn(2, 8, 40, generator=generator)
        return {"input_features": heard, "labels": torch.tensor([[5, 6, 7, 2], [9, 2, -100, -100]])}
    if kind in ("clip", "siglip"):
        return {**words([[1, 5, 6, 7, 2], [1, 9, 2]]), "pixel_values": images, "return_loss": True}
    if kind == "qwen":
        places, grid = [97] + [IMAGE_TOKEN] * 4 + [96], torch.tensor([[1, 4, 4], [1, 4, 4]])
        images = {"pixel_values": torch.randn(32, 3 * 2 * 14 * 14, generator=generator), "image_grid_thw": grid}
    elif kind in ("idefics3", "smolvlm"):
        places, images = [IMAGE_TOKEN], {"pixel_values": images[:, None]}  # 2 x 2 patches become one
    else:
        count = 17 if kind == "florence2" else 4  # of 4 x 4 and their mean, of 2 x 2 patches, or of 4 queries
        places, images = [IMAGE_TOKEN] * count, {"pixel_values": images}
    batch = words([[1, *places, 5, 6, 7], [1, *places, 9]])
    if kind == "florence2":
        return {**batch, **images, "labels": torch.tensor([[5, 6, 2], [9, 2, -100]])}
    if kind == "paligemma":
        batch["token_type_ids"] = (batch["input_ids"] < IMAGE_TOKEN).long() * batch["attention_mask"]
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] > 90), -100)
    return {**batch, **images, "labels": labels}


def make_timm(kind: str) -> nn.Module:
    name, options = TIMM[kind]
    return timm.create_model(name, **options)


def side(kind: str) -> int:
    return TIMM[kind][1].get("img_size", 32)


def tokenizer(image: str = "<image>") -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words with the ids 0 to 94, and special ones, that of the image too, where models expect
    them.
    """
    known = ["<pad>", "<s>", "</s>", "<unk>", "Describe", "the", "image", ".", "a", "photo", "red", "cat", "dog", ":"]
    vocabulary = {word: i for i, word in enumerate([*known, *(f"w{i}" for i in range(95 - len(known)))])}
    vocabulary |= {"<video>": 95, "<end>": 96, "<start>": 97, image: IMAGE_TOKEN}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[image, "<video>", "<start>", "<end>"],
        model_max_length=64,
    )


def image_processor(side: int = 32) -> transformers.BaseImageProcessor:
    size = {"height": side, "width": side}
    return transformers.CLIPImageProcessor(size=size, crop_size=size)


def save(model: nn.Module, folder: Path, processor: object | None = None) -> Path:
    """A folder as it would come from the hub."""
    model.save_pretrained(folder)
    if processor:
        processor.save_pretrained(folder)
    return folder


def pruned_timm() -> nn.Module:
    """A small ViT of timm with the same random weights each time."""
    torch.manual_seed(0)
    return make_timm("vit")
