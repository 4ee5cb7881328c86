"""What runs read, as it stands in the YAML files of configs/. Needs no torch, so that it is checked at once."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from configs.general_loader import GeneralLoader
from configs.loading import load_config, read_yaml
from configs.shard_names import is_pattern, shard_paths

BUNDLED_SPLITS = ("scenes", "unseen_scenes", "unseen_glyphs")
HOW_TO_GET = "README.md says how to get the annotations and images"
LABELLED = {"imagenet": "{split}", "flowers102": "images"}  # public sets -> where the images of a split are
FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")  # package.module:function
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # on a hub: owner/name
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # what ends like this is a file, there or not


def at_least(config: Any, minimum: int, *names: str) -> None:
    """ValueError where one of these fields is set and less."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")


def is_hosted(weights: str) -> bool:
    """Whether this is a folder that transformers saved, or may name a repository on its hub."""
    repository = REPOSITORY.fullmatch(weights) and Path(weights).suffix not in WEIGHTS_SUFFIXES
    return bool(repository) or Path(weights).is_dir()


IMAGENET = "data/imagenet"
_TRAINED_ON = {"vit_mini": "bundled"}  # models of timm that know other images than ImageNet's


def images_of(model: str) -> str:
    """The data path of a model of timm where none is given."""
    return _TRAINED_ON.get(model, IMAGENET)


@dataclass(frozen=True)
class Files:
    """An annotation file in one of the public layouts and the folder of its images; or WebDataset shards, which have
    both: no `annotations`, and `images` as `configs.shard_names.shard_paths` takes it. roots: the folders of the
    images by the "dataset" of a record, for files with images of several; the other records' are in `images`.
    """

    annotations: str = ""
    images: str = ""
    roots: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.images:
            raise ValueError("images must name a folder, or shards such as images/cc3m/{00000..00331}.tar")
        if self.annotations and is_pattern(self.images):
            raise ValueError(f"images {self.images} are shards, which hold their captions: leave annotations out")
        if self.roots and not self.annotations:
            raise ValueError("roots are for annotation files: leave them out, or give annotations")

    @property
    def folders(self) -> str | dict[str, str]:
        """The image folder, or the folders by a record's "dataset", "" for any other."""
        return {**self.roots, "": self.images} if self.roots else self.images

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
    not); bundled_seed gives others of them. limit: at most so many images. k_test: candidates of each query that are
    re-ranked; 0 for contrastive similarity alone.
    """

    k_test: int = 256
    bundled_scenes: int = 0
    bundled_split: str = "scenes"
    bundled_seed: int = 0
    files: Files | None = None
    limit: int | None = None

    def __post_init__(self):
        at_least(self, 0, "k_test", "bundled_scenes", "bundled_seed")
        at_least(self, 1, "limit")
        if self.bundled_split not in BUNDLED_SPLITS:
            raise ValueError(f"bundled_split must be one of {', '.join(BUNDLED_SPLITS)}, got {self.bundled_split!r}")
        if self.bundled_scenes and self.files:
            raise ValueError("set bundled_scenes or files, not both")
        if self.files and not self.files.annotations:
            raise ValueError("files must name annotations: shards are for calibration only")


@dataclass(frozen=True)
class PrunedModel:
    """Model and weights of a pruning run, and how its calibration data is read.

    bundled: calibrate on the bundled images. batch_size: samples in a calibration batch. max_skipped: share of
    unreadable images that is tolerated.
    """

    model_config: str
    weights: str
    bundled: bool = False
    batch_size: int = 8
    workers: int = 1
    max_skipped: float = 0.01

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped must be a fraction between 0 and 1, got {self.max_skipped!r}")

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


@dataclass(frozen=True)
class PruneConfig(PrunedModel):
    """Pruning of a model of images and texts: calibrated on `general` (image-text pairs) and `region` files, pairs in a
    general batch, images in a region batch; or on the bundled scenes. general_loader: a YAML file that names these
    files, see `configs.general_loader`.
    """

    CALIBRATION: ClassVar = ("bundled", "general", "region", "batch_size")  # what decides the calibration batches

    general: list[Files] = field(default_factory=list)
    region: list[Files] = field(default_factory=list)
    general_loader: str = ""
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        super().__post_init__()
        if self.general_loader:
            loader = load_config(self.general_loader, GeneralLoader)
            sources = {
                kind: [Files(*files, loader.roots) for files in getattr(loader, kind)] for kind in ("general", "region")
            }
            _take(self, loader, **sources)
        if self.bundled and (self.general or self.region):
            raise ValueError("set bundled: true, or give general and region files, not both")
        if not all(files.annotations for files in self.region):
            raise ValueError("region files must name annotations: shards have no regions")

    def check_calibration(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where calibration data is not configured or not there."""
        if self.bundled:
            return
        if not self.general and not self.region:
            raise ValueError(f"{where}: no calibration data: set bundled: true, or give general and region files")
        _check_loader(self)
        for files in (*self.general, *self.region):
            files.check()

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.files:
            self.evaluation.files.check()
        elif not self.evaluation.bundled_scenes:
            raise ValueError(f"{where}: no evaluation data: set evaluation.bundled_scenes or evaluation.files")

    def reranking(self, k_test: int) -> PruneConfig:
        """This, where the evaluation re-ranks `k_test` candidates."""
        return replace(self, evaluation=replace(self.evaluation, k_test=k_test))


def _take(config: PrunedModel, loader: GeneralLoader, **sources: Any) -> None:
    """Put what a general loader says into a configuration, which may say the same (as a saved one does) or nothing."""
    if not any(sources.values()):
        raise ValueError(f"{config.general_loader}: names no data for this kind of model")
    for name, value in sources.items():
        if getattr(config, name) not in (None, [], value):
            raise ValueError(f"set general_loader, or {' and '.join(sources)}, not both")
        object.__setattr__(config, name, value)
    if loader.batch_size is not None:
        object.__setattr__(config, "batch_size", loader.batch_size)


def _check_loader(config: PrunedModel) -> None:
    """ValueError where a general loader is for another model."""
    if config.general_loader:
        loader = load_config(config.general_loader, GeneralLoader)
        loader.check_sizes(read_yaml(config.model_config), config.general_loader)


@dataclass(frozen=True)
class LabelledImages:
    """A split of a public set of labelled images, in its own layout under `root` (default: data/<dataset>)."""

    dataset: str
    split: str
    root: str = ""

    def __post_init__(self):
        if self.dataset not in LABELLED:
            raise ValueError(f"dataset must be one of {', '.join(LABELLED)}, got {self.dataset!r}")

    @property
    def folder(self) -> Path:
        return Path(self.root or f"data/{self.dataset}")

    @property
    def images(self) -> Path:
        """Where the images are."""
        return self.folder / LABELLED[self.dataset].format(split=self.split)

    @property
    def classes(self) -> Path:
        """The file with the names of the classes."""
        return self.folder / "annots" / "metadata.csv"

    def check(self) -> None:
        """Raises FileNotFoundError, naming what is missing."""
        if not self.classes.is_file():
            raise FileNotFoundError(f"{self.classes}: file not found; {HOW_TO_GET}")
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images}: image folder not found; {HOW_TO_GET}")


@dataclass(frozen=True)
class LabelsEvaluation:
    """Accuracy on `bundled_images` glyphs of the font that is never trained on ("unseen") or of the others ("seen"),
    or on labelled images.
    """

    bundled_images: int = 0
    bundled_split: str = "unseen"
    images: LabelledImages | None = None

    def __post_init__(self):
        at_least(self, 0, "bundled_images")
        if self.bundled_split not in ("unseen", "seen"):
            raise ValueError(f"bundled_split must be unseen or seen, got {self.bundled_split!r}")
        if self.bundled_images and self.images:
            raise ValueError("set bundled_images or images, not both")


@dataclass(frozen=True)
class LabelsPruneConfig(PrunedModel):
    """Pruning of a classifier: calibrated on labelled `images`, or on the bundled glyphs. `weights` may also name a
    folder that transformers saved, or a repository on its hub. general_loader: a YAML file that names the folder of
    ImageNet, see `configs.general_loader`.
    """

    CALIBRATION: ClassVar = ("bundled", "images", "batch_size")  # what decides the calibration batches

    images: LabelledImages | None = None
    general_loader: str = ""
    evaluation: LabelsEvaluation = field(default_factory=LabelsEvaluation)

    def __post_init__(self):
        super().__post_init__()
        if self.general_loader:
            loader = load_config(self.general_loader, GeneralLoader)
            _take(self, loader, images=LabelledImages("imagenet", "train", loader.root) if loader.root else None)
        if self.bundled and self.images:
            raise ValueError("set bundled: true, or give images, not both")

    def check_weights(self) -> None:
        """Raises FileNotFoundError where nothing can be meant by `weights` but a file that is not there."""
        if not is_hosted(self.weights):
            super().check_weights()

    def check_calibration(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where calibration data is not configured or not there."""
        _check_loader(self)
        if self.images:
            self.images.check()
        elif not self.bundled:
            raise ValueError(f"{where}: no calibration data: set bundled: true, or give images")

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.images:
            self.evaluation.images.check()
        elif not self.evaluation.bundled_images:
            raise ValueError(f"{where}: no evaluation data: set evaluation.bundled_images or evaluation.images")

    def reranking(self, k_test: int) -> LabelsPruneConfig:
        """Raises ValueError where candidates are to be re-ranked, which is of retrieval."""
        if k_test:
            raise ValueError("--k_test re-ranks the candidates of retrieval, and this model classifies: leave it out")
        return self


@dataclass(frozen=True)
class ExternalPruneConfig(PrunedModel):
    """Pruning of any other model, `timm:NAME`, `hf:NAME_OR_FOLDER` or `package.module:function`.

    weights: "published", "random", or a file. calibration: a folder of images, or a function of the user's that returns
    batches; loss: one that gives a batch's loss, both as package.module:function. include, exclude: globs over layers
    that are prunable and that are not. groups: name -> globs over its layers.
    """

    CALIBRATION: ClassVar = ("calibration", "loss", "batch_size")  # what decides the calibration batches

    model_config: str = ""  # there is none
    weights: str = "published"
    workers: int = 0
    model: str = ""
    calibration: str = ""
    loss: str = ""
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.loss and not FUNCTION.fullmatch(self.loss):
            raise ValueError(f"loss must be package.module:function, got {self.loss!r}")

    @property
    def file(self) -> str | None:
        """The file with the weights; None for published and for random ones."""
        return None if self.weights == "published" else self.checkpoint

    def check_weights(self) -> None:
        """Raises FileNotFoundError where `weights` is a file that is not there."""
        if self.file:
            super().check_weights()

    def check_calibration(self, where: str) -> None:
        """Raises ValueError or FileNotFoundError where calibration data is not given or not there."""
        if not self.calibration:
            raise ValueError("this pruner needs --calibration, a folder of images or package.module:function")
        if not Path(self.calibration).is_dir() and not FUNCTION.fullmatch(self.calibration):
            raise FileNotFoundError(f"--calibration {self.calibration}: neither a folder nor package.module:function")

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError: what this model is for is not known."""
        raise ValueError(f"--evaluate: there is no evaluation of {self.model}: leave it out")


@dataclass(frozen=True)
class NoiseEvaluation:
    """Frechet distance of `samples` samples, drawn by DDIM in `steps` steps with classifier-free `guidance`, from the
    bundled glyphs, by the features of a vision transformer; 0 samples: there is none.
    """

    samples: int = 0
    steps: int = 20
    guidance: float = 1.0
    judge_config: str = "configs/dino/model_mini.yaml"
    judge_weights: str = "data/vit_mini.safetensors"

    def __post_init__(self):
        at_least(self, 0, "samples", "guidance")
        at_least(self, 2, "steps")


@dataclass(frozen=True)
class NoisePruneConfig(PrunedModel):
    """Pruning of a model that predicts noise: calibrated on samples with noise, at all times of the schedule. They are
    the bundled glyphs, a file of `latents` (see sample.py), or else what the dense model itself draws.
    """

    CALIBRATION: ClassVar = ("bundled", "latents", "batch_size")  # what decides the calibration batches

    latents: str = ""
    evaluation: NoiseEvaluation = field(default_factory=NoiseEvaluation)

    def __post_init__(self):
        super().__post_init__()
        if self.bundled and self.latents:
            raise ValueError("set bundled: true, or give latents, not both")

    def check_calibration(self, where: str) -> None:
        """Raises FileNotFoundError where the file of latents is not there."""
        if self.latents and not Path(self.latents).is_file():
            raise FileNotFoundError(f"{self.latents}: there is no such file of latents; sample.py writes one")

    def check_evaluation(self, where: str) -> None:
        """Raises ValueError where there is nothing to compare samples with."""
        if not (self.bundled and self.evaluation.samples):
            raise ValueError(f"{where}: no evaluation data: set bundled: true and evaluation.samples")

    def reranking(self, k_test: int) -> NoisePruneConfig:
        """Raises ValueError where candidates are to be re-ranked, which is of retrieval."""
        if k_test:
            raise ValueError("--k_test re-ranks the candidates of retrieval, and this model draws: leave it out")
        return self


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
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {list(self.betas)!r}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """Training on image-text pairs, stage after stage."""

    stages: list[Stage]
    validation_scenes: int = 300

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "validation_scenes")
        if not self.stages:
            raise ValueError("stages must have at least one stage")


@dataclass(frozen=True)
class LabelsStage:
    """Part of a curriculum: `steps` batches of single glyphs. strength: of the augmentation, 0 to 1."""

    steps: int
    batch_size: int
    strength: float = 1.0

    def __post_init__(self):
        at_least(self, 1, "steps", "batch_size")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be a fraction between 0 and 1, got {self.strength!r}")


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
            raise ValueError("stages must have at least one stage")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, got {self.label_smoothing!r}")


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
            raise ValueError(f"decay must be from 0 to below 1, got {self.decay!r}")


PRUNE_CONFIGS = {  # by kind of data
    "pairs": PruneConfig,
    "labels": LabelsPruneConfig,
    "noise": NoisePruneConfig,
    "external": ExternalPruneConfig,
}
PRETRAIN_CONFIGS = {"pairs": PretrainConfig, "labels": LabelsPretrainConfig, "noise": NoisePretrainConfig}
