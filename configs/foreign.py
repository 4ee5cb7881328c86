"""Configurations of fine-tuning for a model of another library: `timm:NAME`, `hf:NAME_OR_FOLDER`. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from configs.finetuning import CaptioningConfig, ClassificationConfig, RetrievalConfig, VQAConfig
from configs.sources import at_least
from configs.task import OptimizerConfig, OwnDataConfig, TaskConfig
from sparsity.errors import MissingFileError, UserError
from sparsity.files import weights_files

PUBLISHED, RANDOM = "published", "random"  # values of `weights` that are no file


@dataclass(frozen=True, kw_only=True)
class ForeignConfig(TaskConfig):
    """A task of a model of another library, which brings its own sizes and preprocessing.

    weights: "published", which the library downloads or which lie in the model's folder; "random"; or a file or folder.
    weights_key: where they stand in the file, default as the library reads it.
    """

    model_config: str = ""
    weights: str = PUBLISHED
    weights_key: str = ""

    @property
    def checkpoint(self) -> str | None:
        """The file or folder with the weights; None for published and random ones."""
        return None if self.weights in (PUBLISHED, RANDOM) else self.weights

    def check_weights(self) -> None:
        if self.weights_key and self.checkpoint is None:
            raise UserError(f"--weights_key {self.weights_key}: is a key of a file: give --weights FILE with it")
        if self.checkpoint is not None and not weights_files(self.checkpoint):
            raise MissingFileError(
                f"--weights {self.checkpoint}: there is no such file, nor a folder with weights; it may also be "
                f"{PUBLISHED} or {RANDOM}"
            )


@dataclass(frozen=True)
class AnyOptimizerConfig(OptimizerConfig):
    """opt: adamW, sgd, or any optimizer of timm by its name."""

    KNOWN: ClassVar = ()


@dataclass(frozen=True)
class Augmentation:
    """How timm changes the images of training and their labels, under the names of its training script.

    aa: policy of AutoAugment, as rand-m8-inc1-mstd101. reprob, remode: random erasing. hflip: share that is mirrored.
    scale, ratio: of random crops. mixup, cutmix: alphas; mixup_prob: share of batches that have either.
    drop_path: rate, default the model's own.
    """

    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    hflip: float = 0.5
    color_jitter: float = 0.4
    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    drop_path: float | None = None

    def __post_init__(self):
        at_least(self, 0, "reprob", "hflip", "color_jitter", "mixup", "cutmix", "mixup_prob", "drop_path")
        for name in ("reprob", "hflip", "mixup_prob"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} must be a fraction between 0 and 1, got {getattr(self, name)!r}")
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise UserError(f"{name} must be two numbers above 0, the smaller one first, got {list(pair)!r}")


@dataclass(frozen=True, kw_only=True)
class ForeignClassificationConfig(ForeignConfig, ClassificationConfig):
    """Image classification by any model of timm or transformers.

    keep_head: the classes of `weights`, which have no names, are those of the data in their order. model_kwargs:
    further arguments of timm.create_model.
    """

    optimizer: AnyOptimizerConfig
    dataset: str = ""
    keep_head: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    augmentation: Augmentation = field(default_factory=Augmentation)

    def overridden(self, options: Mapping[str, Any]) -> Self:
        named = {f.name: options.get(f.name) for f in fields(Augmentation)}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items() if v is not None}
        config = replace(super().overridden(options), augmentation=replace(self.augmentation, **given))
        # By its synsets: two classes of ImageNet are called "crane".
        return replace(config, dataset=config.folder) if config.dataset == "imagenet" else config


@dataclass(frozen=True, kw_only=True)
class ForeignRetrievalConfig(ForeignConfig, RetrievalConfig):
    """Image-text retrieval by any model with two towers. batch_size_test: images, or texts, encoded together."""

    batch_size_test: int = 64

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "batch_size_test")

    def check_data(self, where: str) -> None:
        check_given(self)


def check_given(config: OwnDataConfig, what: str = "captions.json, a folder or shards") -> None:
    """Raise UserError or FileNotFoundError unless there is data of the user's: models of others know no other."""
    if not config.data:
        raise UserError(f"give --data {what}: docs/data.md shows what it holds")
    config.check_own()


@dataclass(frozen=True, kw_only=True)
class ForeignCaptioningConfig(ForeignConfig, CaptioningConfig):
    """Captioning by any model that writes about images.

    question: what it is asked, by default to describe the image in its chat template, or, where it has none, nothing:
    it goes on from "a picture of". max_tokens: of a caption that is trained on. max_length, min_length: of one that is
    generated, in tokens, without the question.
    """

    question: str | None = None
    label_smoothing: float = 0.0
    max_length: int = 40
    min_length: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing:
            raise UserError("label_smoothing is not for models of other libraries, which bring their own loss")

    def check_data(self, where: str) -> None:
        check_given(self)

    @property
    def generation(self) -> dict[str, int]:
        return {"num_beams": self.num_beams, "max_length": self.max_length, "min_new_tokens": self.min_length}


@dataclass(frozen=True, kw_only=True)
class ForeignVQAConfig(ForeignConfig, VQAConfig):
    """Visual question answering by any model that writes about images.

    wording: in whose {} a question stands, by default it alone in a chat template, or, where there is none, with words
    around it, as BLIP-2 is published. max_tokens: of an answer that is trained on. max_length: of one that is
    generated, in tokens. num_beams: of the search.
    """

    wording: str | None = None
    num_beams: int = 3
    max_length: int = 16

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "num_beams", "max_length")
        if self.wording is not None and "{}" not in self.wording:
            raise UserError(f"wording must have {{}} where the question stands, got {self.wording!r}")

    def check_data(self, where: str) -> None:
        check_given(self, "questions.json")

    @property
    def generation(self) -> dict[str, int]:
        """Options of the search for an answer."""
        return {"num_beams": self.num_beams, "max_length": self.max_length}
