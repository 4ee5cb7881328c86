"""Configuration of pretrain.py, as it stands in configs/<model>/pretrain_mini.yaml. Needs no torch: checked at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from configs.sources import at_least
from sparsity.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum: `steps` batches of scenes with up to `max_objects` glyphs.

    objectives: the losses. region_images: images in the region batch of each step; 0 for none. fused_pairs: only so
    many pairs go through the fusion encoder.
    """

    steps: int
    batch_size: int
    max_objects: int
    objectives: list[str]
    region_images: int = 0
    fused_pairs: int | None = None

    def __post_init__(self):
        at_least(self, 1, "steps", "batch_size", "max_objects", "fused_pairs")
        at_least(self, 0, "region_images")
        if not self.objectives:
            raise UserError("objectives must name at least one loss")

    def check(self, objectives: Collection[str], where: str) -> None:
        """Raise UserError where the model does not have one of the losses."""
        for name in self.objectives:
            if name not in objectives:
                raise UserError(f"{where}: unknown objective {name!r}; the model has {', '.join(objectives)}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Model and optimizer ("adamw", or "muon", whose rate of the matrices is `matrix_lr`) of a training run.

    The rate warms up over `warmup` steps, follows a cosine that would end at step `horizon` (default: the last), and is
    cooled down to 0 over the last `cooldown` steps.
    """

    model_config: str
    optimizer: str = "adamw"
    lr: float = 1e-3
    matrix_lr: float = 1.5e-2
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.98)
    warmup: int = 200
    horizon: int | None = None
    cooldown: int = 0
    clip_norm: float = 1.0
    workers: int = 1
    epoch_length: int = 20000
    validate_every: int = 250
    save_every: int = 200

    def __post_init__(self):
        at_least(self, 1, "horizon", "epoch_length", "validate_every", "save_every")
        at_least(self, 0, "lr", "matrix_lr", "weight_decay", "warmup", "cooldown", "clip_norm", "workers")
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be two numbers from 0 to below 1, got {list(self.betas)!r}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Training on image-text pairs, stage after stage."""

    stages: list[Stage]
    validation_scenes: int = 300

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "validation_scenes")
        if not self.stages:
            raise UserError("stages must have at least one stage")


@dataclass(frozen=True)
class LabelsStage:
    """Part of a curriculum: `steps` batches of single glyphs. strength: of the augmentation, 0 to 1."""

    steps: int
    batch_size: int
    strength: float = 1.0

    def __post_init__(self):
        at_least(self, 1, "steps", "batch_size")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength must be a fraction between 0 and 1, got {self.strength!r}")


@dataclass(frozen=True, kw_only=True)
class LabelsPretrainConfig(TrainingConfig):
    """Training on labelled images, stage after stage; validation on `validation_images` of the font not trained on.

    label_smoothing: share of the target that is spread over all classes.
    """

    stages: list[LabelsStage]
    label_smoothing: float = 0.0
    validation_images: int = 556

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "validation_images")
        if not self.stages:
            raise UserError("stages must have at least one stage")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing!r}")


@dataclass(frozen=True, kw_only=True)
class NoisePretrainConfig(TrainingConfig):
    """Training on glyphs with noise, `steps` batches of `batch_size`.

    decay: of the moving average of the weights, which is the result. Validation on `validation_images` glyphs, and in
    pictures of `pictures` samples that are drawn in `sampling_steps` steps.
    """

    steps: int
    batch_size: int = 64
    decay: float = 0.999
    validation_images: int = 512
    pictures: int = 64
    sampling_steps: int = 25

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size", "validation_images", "pictures")
        at_least(self, 2, "sampling_steps")
        if not 0 <= self.decay < 1:
            raise UserError(f"decay must be from 0 to below 1, got {self.decay!r}")


PRETRAIN_CONFIGS = {"pairs": PretrainConfig, "labels": LabelsPretrainConfig, "noise": NoisePretrainConfig}
