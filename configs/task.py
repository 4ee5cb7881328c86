"""Settings of every fine-tuning configuration: weights, optimizer, schedule, batches, logging. Needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from configs.decoding import Decoding
from configs.shard_names import is_pattern, shard_paths
from configs.sources import at_least
from sparsity.errors import MissingFileError, UserError
from sparsity.files import weights_files

OPTIMIZERS = ("adamW", "sgd")
SCHEDULES = ("linear", "cosine")
DEBUG_STEPS = 4  # of an epoch
OWN_FILES = ("captions.json", "captions.jsonl", "questions.json", "questions.jsonl")  # in a folder of the user's
OWN_DATA = "docs/data.md shows what it may be"
DEBUG_IMAGES = 32  # that are evaluated


@dataclass(frozen=True)
class OptimizerConfig:
    """opt: one of KNOWN. lr: peak rate. lr_mult: factor of it for parameters that the pretrained model does not have.
    min_lr: where a cosine ends. betas: of AdamW; the first is the momentum of SGD.
    """

    KNOWN: ClassVar = OPTIMIZERS

    lr: float
    opt: str = "adamW"
    weight_decay: float = 0.01
    lr_mult: float = 1.0
    min_lr: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.98)

    def __post_init__(self):
        at_least(self, 0, "lr", "weight_decay", "lr_mult", "min_lr")
        if self.KNOWN and self.opt not in self.KNOWN:
            raise UserError(f"opt must be one of {', '.join(self.KNOWN)}, got {self.opt!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be two numbers from 0 to below 1, got {list(self.betas)!r}")
        if self.min_lr > self.lr:
            raise UserError(f"min_lr must be at most lr = {self.lr:g}, got {self.min_lr!r}")


@dataclass(frozen=True)
class SchedulerConfig:
    """sched: "linear" or "cosine", down from the peak. num_warmup_steps: share of all steps in which the rate rises."""

    epochs: int
    sched: str = "linear"
    num_warmup_steps: float = 0.0

    def __post_init__(self):
        at_least(self, 0, "epochs")
        if self.sched not in SCHEDULES:
            raise UserError(f"sched must be one of {', '.join(SCHEDULES)}, got {self.sched!r}")
        if not 0 <= self.num_warmup_steps <= 1:
            raise UserError(f"num_warmup_steps is a share from 0 to 1 of all steps, got {self.num_warmup_steps!r}")


@dataclass(frozen=True)
class WandbData:
    """Settings of a run on Weights & Biases; `--experiment_name` takes the place of `name`."""

    project: str = "sparse-finetuning"
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The options that all tasks have. A step of the optimizer sees `batch_size_target` samples: at most
    `batch_size_train` at a time on each device, as often as needed.

    image_res, max_tokens: default the pretrained model's. clip_norm: of the gradient; 0 does not clip. save_every:
    steps between two snapshots, default an epoch's. max_skipped: share of unreadable images that is tolerated.
    decoding: how image files become pictures.
    """

    # What does not change the result of a run: a snapshot may be resumed with other values.
    FREE: ClassVar = ("workers", "max_skipped", "save_every", "log_every", "wandb_data")

    model_config: str
    weights: str
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    batch_size_train: int
    batch_size_target: int
    image_res: int | None = None
    max_tokens: int | None = None
    clip_norm: float = 0.0
    gradient_checkpointing: bool = False
    workers: int = 1
    max_skipped: float = 0.01
    decoding: Decoding = field(default_factory=Decoding)
    save_every: int | None = None
    log_every: int = 20
    wandb_data: WandbData = field(default_factory=WandbData)

    def __post_init__(self):
        at_least(self, 1, "batch_size_train", "batch_size_target", "image_res", "max_tokens", "save_every", "log_every")
        at_least(self, 0, "clip_norm", "workers")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"max_skipped must be a fraction between 0 and 1, got {self.max_skipped!r}")

    @property
    def checkpoint(self) -> str | None:
        """The file with the pretrained weights; None for random ones."""
        return None if self.weights == "random" else self.weights

    def overridden(self, options: Mapping[str, Any]) -> Self:
        """Return the configuration with what the options of `engine.options.recipe_values` say where they are given,
        that is, neither absent nor None. UserError where sizes of batches do not go together.
        """

        def given(**names: str) -> dict[str, Any]:
            return {key: options[name] for key, name in names.items() if options.get(name) is not None}

        sizes = given(image_res="image_size", batch_size_target="batch_size")
        if options.get("batch_size_train") is None:
            sizes |= self._share(options["devices"] * options["num_nodes"], sizes.get("batch_size_target"))
        schedule = given(epochs="epochs", num_warmup_steps="warmup_frac", sched="sched_type")
        rates = given(lr="lr", weight_decay="weight_decay", opt="optimizer_name")
        optimizer, scheduler = replace(self.optimizer, **rates), replace(self.scheduler, **schedule)
        return replace(self, optimizer=optimizer, scheduler=scheduler, **sizes)

    def _share(self, devices: int, given: int | None) -> dict[str, int]:
        """Return the samples at a time on each device where nobody says how many: all that a device has of `given`
        samples in a step; else as many as the configuration says, but no more than a device has of its samples.
        """
        share, left = divmod(given or self.batch_size_target, devices)
        if not left:
            return {"batch_size_train": share if given else min(self.batch_size_train, share)}
        if given:
            raise UserError(f"--batch_size {given} is no multiple of {devices} devices")
        return {}  # which `accumulation` refuses

    def check_weights(self) -> None:
        """Raises FileNotFoundError where the file is not there."""
        if self.checkpoint is not None and not weights_files(self.checkpoint):
            raise MissingFileError(f"{self.checkpoint}: weights file not found; give --pretraining_weights PATH")

    def check_data(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where the data of the task is not configured or not there."""
        raise NotImplementedError

    def accumulation(self, devices: int) -> int:
        """Batches of each device in a step; UserError unless they make up `batch_size_target` samples."""
        at_once = self.batch_size_train * devices
        if self.batch_size_target % at_once:
            raise UserError(
                f"batch_size_target {self.batch_size_target} is no multiple of batch_size_train "
                f"{self.batch_size_train} x {devices} device{'s' * (devices > 1)} = {at_once}: change one of them"
            )
        return self.batch_size_target // at_once

    def steps_per_epoch(self, samples: int, debug: bool = False) -> int:
        steps = math.ceil(samples / self.batch_size_target)
        return min(steps, DEBUG_STEPS) if debug else steps

    def sizes(self, pretrained: Any) -> Any:
        """Those of the pretrained model, a dataclass with `vision.image_size` and `max_tokens`, made the task's."""
        tokens = pretrained.max_tokens if self.max_tokens is None else self.max_tokens
        side = pretrained.vision.image_size if self.image_res is None else self.image_res
        return replace(pretrained, max_tokens=tokens, vision=replace(pretrained.vision, image_size=side))

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the result of a run."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig(TaskConfig):
    """A task on data of the user's, where `data` is set (`--data`); else on what the other keys name.

    val_data: what the best weights are chosen by; by default `val_fraction` of the images of `data`, 0 for none, when
    the last weights are the result.
    """

    PUBLIC: ClassVar[tuple[str, ...]] = ()  # keys whose place the user's data takes

    data: str | None = None
    val_data: str | None = None
    val_fraction: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be from 0 to below 1, got {self.val_fraction!r}")
        if self.val_data and not self.data:
            raise UserError("val_data is for data of one's own: set data, too")

    def overridden(self, options: Mapping[str, Any]) -> Self:
        """Return it without what the user's data takes the place of, too."""
        config = super().overridden(options)
        if not config.data:
            return config
        named = {"data": _listed(config.data), "val_data": config.val_data and _listed(config.val_data)}
        return replace(config, **config._unset(), **named)

    def _unset(self) -> dict[str, Any]:
        return {option.name: _default(option) for option in fields(self) if option.name in self.PUBLIC}

    def check_own(self) -> None:
        """Raises FileNotFoundError or UserError where the user's data is not there."""
        for option, path in (("--data", self.data), ("--val_data", self.val_data)):
            if path:
                check_path(option, path)


def _listed(path: str) -> str:
    """Return the file in a folder that lists what is in it, so that its content decides which run is the same; else the
    path as it is.
    """
    files = (Path(path, name) for name in OWN_FILES)
    return next((str(file) for file in files if file.is_file()), path)


def check_path(option: str, path: str) -> None:
    """Raise FileNotFoundError or UserError unless there is a file, a folder or shards of this name."""
    if is_pattern(path):
        shard_paths(path)
    elif not Path(path).exists():
        raise MissingFileError(f"{option} {path}: there is no such file or folder; {OWN_DATA}")


def _default(option: Field[Any]) -> Any:
    """Return what an option of a dataclass is where nothing is given."""
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default
