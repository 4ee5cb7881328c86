"""How models of timm, of transformers and of neither are dealt with: the output head, how a batch goes in, the loss."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.external.heads import heads_by_kind
from models.external.layer_names import DECODER, TEXT, is_head, text_field, tower
from sparsity.errors import UserError
from sparsity.view import accelerators

READS = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio"}  # main input -> group
IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")  # of configurations
WAY_OUT = "give --loss package.module:function, a function of (model, batch) that returns the loss"


class Library:
    """Any nn.Module. A batch is a dict of keyword arguments, a tuple or list of positional ones, or the only one."""

    group = "model"  # of the layers whose names say nothing
    classifies = False  # whether a bare tensor that the model returns has the logits of classes
    shifts = False  # whether the output at a token predicts the next one
    image_ids: Sequence[int] = ()  # tokens in whose place the language model reads images

    def __init__(self, model: nn.Module):
        self.model = model

    def heads(self) -> set[str]:
        """Names of the modules that make the output."""
        return {name for name, _ in self.model.named_modules() if is_head(name)}

    def group_of(self, layer: str) -> str:
        return tower(layer) or self.group

    def text_field(self, key: str) -> str | None:
        """The field of a batch with the real tokens of a text layer's input, see `layer_names.text_field`."""
        return text_field(key, encoder_decoder=False)

    def fitted(self, batch: Any) -> Any:
        """The batch with tensors of float32, as preprocessing makes them, in the dtype that the whole model has."""
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if len(kinds) != 1 or kinds == {torch.float32}:
            return batch
        (own,) = kinds
        return _mapped(batch, lambda tensor: tensor.to(own) if tensor.dtype == torch.float32 else tensor)

    def forward(self, batch: Any) -> Any:
        """Run a batch for what the layers read: the output need not be whole. UserError where it does not fit."""
        return self.output(batch)

    def labels(self, batch: Any) -> Tensor | None:
        """The labels in a batch; None where there are none."""
        found = batch.get("labels") if isinstance(batch, Mapping) else None
        return found if isinstance(found, Tensor) and not found.is_floating_point() else None

    def output(self, batch: Any) -> Any:
        """The model's output for a batch, which it must be able to take (UserError)."""
        args, kwargs = _arguments(batch)
        try:
            inspect.signature(self.model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(
                f"a calibration batch does not fit the model's forward: {error}; a dict becomes keyword arguments, a"
                " tuple or list positional ones"
            ) from None
        return self.model(*args, **kwargs)

    def loss(self, batch: Any) -> Tensor:
        """The loss that the model returns itself, under "loss"."""
        output = self.output(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"the model returns no loss for a calibration batch; {WAY_OUT}")
        return loss


class Timm(Library):
    """timm: a batch is the images, or (images, labels)."""

    group = "vision"

    @property
    def classifies(self) -> bool:
        """Whether it has a head of classes: without one it returns features."""
        return self.model.num_classes > 0

    def heads(self) -> set[str]:
        return _names_of(self.model, self.model.get_classifier())

    def group_of(self, layer: str) -> str:
        return self.group

    def output(self, batch: Any) -> Any:
        return super().output(batch[:1] if isinstance(batch, tuple | list) else batch)

    def labels(self, batch: Any) -> Tensor | None:
        return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None

    def loss(self, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UserError(
                "a timm model has its loss, cross-entropy, from labels: let --calibration be a folder with a subfolder"
                f" of images for each class, or a loader of (images, labels); or {WAY_OUT}"
            )
        logits = self.output(batch)
        if int(batch[1].max()) >= logits.shape[-1]:
            raise UserError(f"label {int(batch[1].max())} does not exist: the model has {logits.shape[-1]} classes")
        return F.cross_entropy(logits.float(), batch[1])


class Transformers(Library):
    """transformers: a batch is a dict, as processors make it."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        text = model.config.get_text_config(decoder=True)
        both = {"text_encoder", "text_decoder"} <= {name for name, _ in model.named_children()}  # BLIP's answers
        self.encoder_decoder = bool(model.config.is_encoder_decoder or text.is_encoder_decoder or both)
        self.group = READS.get(model.main_input_name, TEXT)
        self.words = model.get_output_embeddings()
        self.shifts = self.words is not None and not self.encoder_decoder and not _masks(model)
        known = model.config.to_dict()
        self.image_ids = [known[key] for key in IMAGE_IDS if isinstance(known.get(key), int)]

    def heads(self) -> set[str]:
        words = _names_of(self.model, self.model.get_output_embeddings())
        told = any(task in type(self.model).__name__ for task in ("Detection", "Segmentation"))  # what to look for
        predicts = told or self.model.main_input_name == "pixel_values"
        # A text head is known by its embeddings.
        return super().heads() | words | (heads_by_kind(self.model) if predicts and not words else set())

    def group_of(self, layer: str) -> str:
        writes = self.encoder_decoder and self.words is not None and DECODER.search(f"{layer}.")
        return tower(layer) or (TEXT if writes else self.group)

    def text_field(self, key: str) -> str | None:
        field = text_field(key, self.encoder_decoder)
        seen = self.model.main_input_name in READS  # whose mask is of frames or patches, not of what the encoder makes
        return None if self.encoder_decoder and seen and field == "attention_mask" else field

    def output(self, batch: Any) -> Any:
        if isinstance(batch, Mapping) and self.words is not None and _accepts(self.model, "use_cache"):
            batch = {**batch, "use_cache": False}  # a cache would hold the keys and values of all layers
        return super().output(batch)

    def forward(self, batch: Any) -> Any:
        """The logits of the last token alone: those of all of them are the largest tensor of a language model."""
        if self.encoder_decoder or not isinstance(batch, Mapping):  # the decoder reads the labels
            return self.output(batch)
        batch = {key: value for key, value in batch.items() if key not in ("labels", "return_loss")}
        with _last_token(self.words):
            return self.output(batch)


LIBRARIES: dict[str, type[Library]] = {"timm": Timm, "transformers": Transformers}


def library_of(model: nn.Module) -> Library:
    """Found by the package that the model's class, or one that it derives from, was defined in."""
    packages = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((LIBRARIES[package] for package in packages if package in LIBRARIES), Library)(model)


@contextmanager
def _last_token(head: nn.Module | None) -> Iterator[None]:
    """Inside the block a head that reads (B, T, d) reads (B, 1, d)."""
    if head is None:
        yield
        return

    def narrowed(_: nn.Module, args: tuple) -> tuple:
        many = bool(args) and isinstance(args[0], Tensor) and args[0].ndim == 3
        return (args[0][:, -1:], *args[1:]) if many else args

    hook = head.register_forward_pre_hook(narrowed)
    try:
        yield
    finally:
        hook.remove()


def _masks(model: nn.Module) -> bool:
    """Whether a model predicts words that are hidden, not the next one."""
    return type(model).__name__.endswith("MaskedLM")


def _accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name, or hands on those that it does not know."""
    wanted = inspect.signature(model.forward).parameters
    return argument in wanted or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted.values())


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


@contextmanager
def seeded(seed: int, like: Tensor) -> Iterator[None]:
    """The global random numbers inside the block are those of the seed, and go on afterwards as if it had not been."""
    with torch.random.fork_rng(accelerators(like)):
        torch.manual_seed(seed)
        yield


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Dicts, lists and tuples with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(each, change) for key, each in value.items()}
    return type(value)(_mapped(each, change) for each in value) if type(value) in (list, tuple) else value


def _arguments(batch: Any) -> tuple[tuple, Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _names_of(model: nn.Module, head: Any) -> set[str]:
    """Every name of a module, of the modules in a tuple, or none."""
    modules = {id(module) for module in (head if isinstance(head, tuple | list) else (head,))}
    return {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in modules}
