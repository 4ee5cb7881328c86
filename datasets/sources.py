"""What runs read, as it stands in the YAML files of configs/. Needs no torch, so that it is checked at once."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.shard_names import is_pattern, shard_paths

BUNDLED_SPLITS = ("scenes", "unseen_scenes", "unseen_glyphs")
HOW_TO_GET = "README.md says how to get the annotations and images"


def at_least(config: Any, minimum: int, *names: str) -> None:
    """ValueError where one of these fields is set and less."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


@dataclass(frozen=True)
class Files:
    """An annotation file in one of the public layouts and the folder of its images; or WebDataset shards, which have
    both: no `annotations`, and `images` as `datasets.shard_names.shard_paths` takes it.
    """

    annotations: str = ""
    images: str = ""

    def __post_init__(self):
        if not self.images:
            raise ValueError("images must name a folder, or shards such as images/cc3m/{00000..00331}.tar")
        if self.annotations and is_pattern(self.images):
            raise ValueError(f"images {self.images} are shards, which hold their captions: leave annotations out")

    def check(self) -> None:
        """Raises FileNotFoundError, naming what is missing, or ValueError for a pattern that cannot be."""
        if not self.annotations:
            shard_paths(self.images)
            return
        if not Path(self.annotations).is_file():
            raise FileNotFoundError(f"{self.annotations}: annotation file not found; {HOW_TO_GET}")
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"{self.images}: image folder not found; {HOW_TO_GET}")


@dataclass(frozen=True)
class Evaluation:
    """Zero-shot retrieval: on `bundled_scenes` images that were never trained on, or on files in the COCO layout.

    bundled_split: "scenes" (of the vendors that are trained on), "unseen_scenes" or "unseen_glyphs" (of the one that is
    not). k_test: candidates of each query that are re-ranked; 0 for contrastive similarity alone.
    """

    k_test: int = 256
    bundled_scenes: int = 0
    bundled_split: str = "scenes"
    files: Files | None = None

    def __post_init__(self):
        at_least(self, 0, "k_test", "bundled_scenes")
        if self.bundled_split not in BUNDLED_SPLITS:
            raise ValueError(f"bundled_split must be one of {', '.join(BUNDLED_SPLITS)}, got {self.bundled_split!r}")
        if self.bundled_scenes and self.files:
            raise ValueError("set bundled_scenes or files, not both")
        if self.files and not self.files.annotations:
            raise ValueError("files must name annotations: shards are for calibration only")


@dataclass(frozen=True)
class PruneConfig:
    """Model, weights and calibration data of a pruning run.

    bundled: calibrate on the bundled scenes; otherwise on `general` (image-text pairs) and `region` files. batch_size:
    pairs in a general batch, images in a region batch. max_skipped: share of unreadable images that is tolerated.
    """

    model_config: str
    weights: str
    bundled: bool = False
    general: list[Files] = field(default_factory=list)
    region: list[Files] = field(default_factory=list)
    batch_size: int = 8
    workers: int = 1
    max_skipped: float = 0.01
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped must be a fraction between 0 and 1, got {self.max_skipped!r}")
        if self.bundled and (self.general or self.region):
            raise ValueError("set bundled: true, or give general and region files, not both")
        if not all(files.annotations for files in self.region):
            raise ValueError("region files must name annotations: shards have no regions")

    @property
    def checkpoint(self) -> str | None:
        """The file with the weights; None for random ones."""
        return None if self.weights == "random" else self.weights

    def check_weights(self) -> None:
        """Raises FileNotFoundError where the file is not there."""
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise FileNotFoundError(
                f"{self.checkpoint}: weights file not found; give --weights PATH, or --weights random"
            )

    def check_calibration(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where calibration data is not configured or not there."""
        if self.bundled:
            return
        if not self.general and not self.region:
            raise ValueError(f"{where}: no calibration data: set bundled: true, or give general and region files")
        for files in (*self.general, *self.region):
            files.check()

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.files:
            self.evaluation.files.check()
        elif not self.evaluation.bundled_scenes:
            raise ValueError(f"{where}: no evaluation data: set evaluation.bundled_scenes or evaluation.files")


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
            raise ValueError("objectives must name at least one loss")

    def check(self, objectives: Collection[str], where: str) -> None:
        """ValueError where the model does not have one of the losses."""
        for name in self.objectives:
            if name not in objectives:
                raise ValueError(f"{where}: unknown objective {name!r}; the model has {', '.join(objectives)}")


@dataclass(frozen=True)
class PretrainConfig:
    """Model, curriculum and optimizer ("adamw", or "muon", whose rate of the matrices is `matrix_lr`).

    The rate warms up over `warmup` steps, follows a cosine that would end at step `horizon` (default: the last), and is
    cooled down to 0 over the last `cooldown` steps.
    """

    model_config: str
    stages: list[Stage]
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
    validation_scenes: int = 300
    save_every: int = 200

    def __post_init__(self):
        at_least(self, 1, "horizon", "epoch_length", "validate_every", "validation_scenes", "save_every")
        at_least(self, 0, "lr", "matrix_lr", "weight_decay", "warmup", "cooldown", "clip_norm", "workers")
        if not self.stages:
            raise ValueError("stages must have at least one stage")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(self.betas)!r}")
