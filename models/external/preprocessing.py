"""Images or sounds, captions and classes to batches of a model, by the model's own preprocessing (timm's data
configuration, the processor of transformers).

`preprocessing(model)` is a callable: a list of B RGB images or sounds (samples,), B captions or None, B labels or None
-> batch. Its `labels(names)` are the labels of class folders with these names, its `check(captioned)` refuses items
without captions where a model needs them. rate: samples a second of the sounds; None: it takes images.
"""

import contextlib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.external.labels import Classes, classes_of_timm, classes_of_transformers, read_map
from models.external.libraries import Timm, Transformers, library_of, takes
from models.external.texts import IGNORED, OWN_LOADER
from models.hub import first_line, local_only
from sparsity.errors import UserError

log = logging.getLogger(__name__)

PREFIXED = ("paligemma",)  # kinds whose image and prompt see each other both ways
PROMPT = "Describe the image."  # what a generative model is asked
CAPTIONS = "put captions.json in it, {image: caption}, or 1.txt beside 1.jpg"  # how to give captions


class _Items:
    rate: int | None = None


class _Classified(_Items):
    """Calibration on images, and on their classes where the model has a loss. class_map: see `read_map`."""

    def __init__(self, classes: Classes, class_map: str):
        self.classes, self.given = classes, read_map(class_map, classes) if class_map else None

    def check(self, captioned: bool) -> None:
        pass

    def labels(self, names: Sequence[str]) -> list[int]:
        """UserError, which lists them, where some are none of the model's."""
        return self.classes.labels(names, self.given)


class TimmImages(_Classified):
    """Batches (images,) or (images, labels)."""

    def __init__(self, model: nn.Module, class_map: str = ""):
        super().__init__(classes_of_timm(model), class_map)
        from timm.data import create_transform, resolve_data_config

        self.transform = create_transform(**resolve_data_config({}, model=model), is_training=False)

    def __call__(
        self, images: Sequence[Image.Image], captions: Any, labels: Sequence[int] | None
    ) -> tuple[Tensor, ...]:
        pixels = torch.stack([self.transform(image) for image in images])  # (B, 3, H, W)
        return (pixels,) if labels is None else (pixels, torch.tensor(labels))


class Images(_Classified):
    """transformers models of images alone: what the image processor makes, and labels."""

    def __init__(self, model: nn.Module, processor: Any, class_map: str = ""):
        super().__init__(classes_of_transformers(model.config), class_map)
        self.processor = processor

    def __call__(self, images: Sequence[Image.Image], captions: Any, labels: Sequence[int] | None) -> dict[str, Tensor]:
        batch = dict(self.processor(images=list(images), return_tensors="pt"))
        return batch if labels is None else batch | {"labels": torch.tensor(labels)}


class Pairs(_Items):
    """Models that compare images and texts (CLIP, SigLIP); their loss needs captions."""

    def __init__(self, model: nn.Module, processor: Any):
        self.processor, tokenizer = processor, processor.tokenizer
        positions = model.config.get_text_config().max_position_embeddings
        self.length = min(tokenizer.model_max_length, positions)
        # Tokenizers that make no attention mask belong to models trained on texts padded to the full length.
        self.padding = "longest" if "attention_mask" in tokenizer.model_input_names else "max_length"
        self.contrastive, self.kind = takes(model, "return_loss"), type(model).__name__

    def check(self, captioned: bool) -> None:
        """Raise UserError without captions: one text for all images would say nothing of what the text layers read."""
        if not captioned:
            raise UserError(f"--calibration: {self.kind} reads texts, and the folder has no captions: {CAPTIONS}")

    def labels(self, names: Sequence[str]) -> None:
        return None

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str] | None, labels: Any) -> dict[str, Any]:
        self.check(captions is not None)
        texts = list(captions)
        batch = dict(self.processor(images=list(images), text=texts, **self._options()))
        return batch | ({"return_loss": True} if self.contrastive else {})

    def _options(self) -> dict[str, Any]:
        """Return the processor's options for texts."""
        return {"padding": self.padding, "truncation": True, "max_length": self.length, "return_tensors": "pt"}

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the fields of a batch that its images make."""
        return dict(self.processor(images=list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the fields of a batch that its texts make."""
        return dict(self.processor(text=list(texts), **self._options()))


class Generative(_Items):
    """Models that write a text about an image (BLIP-2, LLaVA, Qwen-VL): asked `PROMPT`, they answer the caption, and
    the loss is that of the answer's tokens.
    """

    def __init__(self, model: nn.Module, processor: Any):
        self.processor, tokenizer, self.kind = processor, processor.tokenizer, type(model).__name__
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        decoder = model.config.get_text_config(decoder=True)
        self.encoder_decoder = bool(decoder.is_encoder_decoder)
        self.prefixed = model.config.model_type in PREFIXED
        self.image = "" if processor.chat_template else self._image_token(getattr(model.config, "image_token_id", None))

    def check(self, captioned: bool) -> None:
        """Raise UserError without captions: one text for all images would say nothing of what the text layers read."""
        if not captioned:
            raise UserError(f"--calibration: {self.kind} reads texts, and the folder has no captions: {CAPTIONS}")

    def labels(self, names: Sequence[str]) -> None:
        return None

    def _image_token(self, token: int | None) -> str:
        """Return what stands for the image in a text: nothing where the processor puts it there, or no token does."""
        if token is None:
            return ""
        if self.prefixed:  # else its processor warns in each batch
            return self.processor.tokenizer.convert_ids_to_tokens(token)
        try:
            ids = self.processor(images=[Image.new("RGB", (64, 64))], text=[PROMPT], return_tensors="pt")["input_ids"]
        except ValueError:  # an image without a place
            return self.processor.tokenizer.convert_ids_to_tokens(token)
        return "" if (ids == token).any() else self.processor.tokenizer.convert_ids_to_tokens(token)

    def asked(self, question: str) -> str:
        """Return the text in which a question is asked about an image, up to where the answer begins."""
        if not self.processor.chat_template:
            return f"{self.image}{question}"
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def text(self, caption: str | None) -> str:
        """The prompt, with the caption as the answer where it is not to be left out."""
        if not self.processor.chat_template:
            return f"{self.image}{PROMPT}" + ("" if caption is None else f" {caption}")
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
        if caption is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": caption}]})
        return self.processor.apply_chat_template(chat, add_generation_prompt=caption is None, tokenize=False)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str] | None, labels: Any) -> dict[str, Any]:
        self.check(captions is not None)
        if self.prefixed:  # prompt and image see each other, not the caption, which has the labels
            asked = {"text": [self.asked(PROMPT)] * len(images), "suffix": list(captions), "padding": True}
            return dict(self.processor(images=list(images), **asked, return_tensors="pt"))
        answers = [None] * len(images) if self.encoder_decoder else captions
        texts = [self.text(answer) for answer in answers]
        batch = dict(self.processor(images=list(images), text=texts, padding=True, return_tensors="pt"))
        if self.encoder_decoder:
            return batch | _decoded(self.processor.tokenizer, captions)
        prompt = self._tokens(self.text(None))
        length = torch.tensor([max(1, self._tokens(text) - prompt) for text in texts])  # of each answer
        real = batch["attention_mask"]
        left = real.flip(1).cumsum(1).flip(1)  # (B, T): real tokens from here to the end
        answered = (real != 0) & (left <= length[:, None])
        return batch | {"labels": batch["input_ids"].masked_fill(~answered, IGNORED)}

    def _tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text)["input_ids"])


class Sounds(_Classified):
    """Models that hear (Whisper, wav2vec 2.0 and their like): what the feature extractor makes of the samples; labels
    are the tokens of what is said, or the classes of a model without a tokenizer.

    A decoder beside an encoder reads what is said: such a model needs texts.
    """

    def __init__(self, model: nn.Module, processor: Any, class_map: str = ""):
        super().__init__(classes_of_transformers(model.config), class_map)
        self.extract = getattr(processor, "feature_extractor", processor)
        self.tokenizer, self.kind = getattr(processor, "tokenizer", None), type(model).__name__
        self.rate, config = int(self.extract.sampling_rate), model.config
        self.written = takes(model, "labels") and self.tokenizer is not None
        self.decodes, self.start = bool(config.is_encoder_decoder), getattr(config, "decoder_start_token_id", None)
        self.most = getattr(config, "max_target_positions", None)
        own = inspect.signature(type(self.extract).__call__).parameters["padding"].default
        self.padding = own or "longest"  # Whisper reads 30 seconds, always

    def check(self, captioned: bool) -> None:
        """Raise UserError without texts where the model has a decoder, which would read nothing."""
        if self.decodes and not captioned:
            how = "put captions.json in it, {sound: text}, or 1.txt beside 1.wav"
            raise UserError(f"--calibration: {self.kind} writes texts, and the folder has none: {how}")

    def labels(self, names: Sequence[str]) -> list[int] | None:
        return None if self.tokenizer is not None else super().labels(names)

    def __call__(self, sounds: Sequence[Any], captions: Sequence[str] | None, labels: Sequence[int] | None) -> Any:
        heard = self.extract(list(sounds), sampling_rate=self.rate, padding=self.padding, return_tensors="pt")
        batch = dict(heard)
        if self.tokenizer is None:
            return batch if labels is None else batch | {"labels": torch.tensor(labels)}
        if captions is None or not self.written:
            return batch
        written = _decoded(self.tokenizer, captions, self.start if self.decodes else None, self.most)
        return batch | (written if self.decodes else {"labels": written["labels"]})


def _decoded(
    tokenizer: Any, captions: Sequence[str], start: int | None = None, most: int | None = None
) -> dict[str, Tensor]:
    """Return what a decoder beside an encoder reads: the captions, of at most so many tokens. start: the token that the
    model itself puts in front, which is left out where the tokenizer does so, too.
    """
    cut = {} if most is None else {"truncation": True, "max_length": most}
    texts = tokenizer(list(captions), padding=True, return_tensors="pt", **cut)
    ids, real = texts["input_ids"], texts["attention_mask"]
    if start is not None and ids.shape[1] > 1 and bool((ids[:, 0] == start).all()):
        ids, real = ids[:, 1:], real[:, 1:]
    shifted = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)  # it reads what it has written
    return {"labels": ids.masked_fill(real == 0, IGNORED), "decoder_attention_mask": shifted}


def preprocessing(model: nn.Module, class_map: str = "") -> TimmImages | Images | Pairs | Generative | Sounds:
    """Raise UserError where a model has no preprocessing of its own, or none for images or sounds.

    class_map: a JSON file, {folder: class}, for models with classes; by default their names say which they are.
    """
    library = library_of(model)
    if isinstance(library, Timm):
        return TimmImages(model, class_map)
    if not isinstance(library, Transformers):
        raise UserError(f"--calibration: only models of timm and transformers bring their preprocessing; {OWN_LOADER}")
    hears = model.main_input_name in ("input_features", "input_values")
    processor = load_processor(model.name_or_path, hears=hears)
    if hears:
        return Sounds(model, processor, class_map)
    if not takes(model, "pixel_values"):
        texts = "give a file of texts, .txt or .jsonl" if model.main_input_name == "input_ids" else OWN_LOADER
        raise UserError(f"--calibration: {type(model).__name__} takes no images; {texts}")
    if getattr(processor, "tokenizer", None) is None:
        return Images(model, processor, class_map)
    if class_map:
        raise UserError(f"--class_map: {type(model).__name__} has no classes: leave it out")
    return (Pairs if model.get_output_embeddings() is None else Generative)(model, processor)


def load_processor(name: str, told: str = "--calibration: ", way_out: str = OWN_LOADER, hears: bool = False) -> Any:
    """The processor that belongs to a model of transformers, of one that hears and has no tokenizer its feature
    extractor; UserError, which begins and ends as is said, where it is not to be had.
    """
    import transformers

    options = {"trust_remote_code": False, "local_files_only": local_only(name)}
    try:
        return transformers.AutoProcessor.from_pretrained(name, **options)
    except Exception as error:  # whatever a missing or foreign file makes of it
        with contextlib.suppress(Exception):
            if hears:
                return transformers.AutoFeatureExtractor.from_pretrained(name, **options)
        raise UserError(f"{told}{name!r} has no processor: {first_line(error)}; {way_out}") from error
