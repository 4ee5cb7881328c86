"""What fine-tuning of a model of another library is configured by: `timm:NAME`, `hf:NAME_OR_FOLDER`. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from configs.finetuning import ClassificationConfig
from configs.sources import at_least
from configs.task import OptimizerConfig, TaskConfig
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
        return replace(super().overridden(options), augmentation=replace(self.augmentation, **given))
