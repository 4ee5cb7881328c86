"""Configuration of pruning runs, as it stands in the YAML files of configs/. Needs no torch: it is checked at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from configs.decoding import Decoding
from configs.general_loader import GeneralLoader
from configs.loading import load_config, read_yaml
from configs.sources import FUNCTION, TEXT_FILES, Files, LabelledImages, at_least, is_hosted
from sparsity.errors import MissingFileError, UserError
from sparsity.files import weights_files

DTYPES = ("auto", "float32", "bfloat16", "float16")  # auto: that of the weights
TOKENS = ("all", "text", "vision")  # that a language model is calibrated on
OWN_DATA = "a folder of images or sounds, a file of texts (.txt, .jsonl) or package.module:function"
BUNDLED_SPLITS = ("scenes", "unseen_scenes", "unseen_glyphs")


@dataclass(frozen=True)
class Evaluation:
    """Zero-shot retrieval: on `bundled_scenes` images that were never trained on, or on files in the COCO layout.

    bundled_split: "scenes" (of the vendors that are trained on), "unseen_scenes" or "unseen_glyphs" (of the one that is
    not); bundled_seed gives others of them. limit: at most so many images. k_test: candidates of each query that are
    re-ranked; 0 for contrastive similarity alone. half_tokens: hold image tokens in float16, half the host memory, and
    log by how much that changes the scores.
    """

    k_test: int = 256
    bundled_scenes: int = 0
    bundled_split: str = "scenes"
    bundled_seed: int = 0
    files: Files | None = None
    limit: int | None = None
    half_tokens: bool = False

    def __post_init__(self):
        at_least(self, 0, "k_test", "bundled_scenes", "bundled_seed")
        at_least(self, 1, "limit")
        if self.bundled_split not in BUNDLED_SPLITS:
            raise UserError(f"bundled_split must be one of {', '.join(BUNDLED_SPLITS)}, got {self.bundled_split!r}")
        if self.bundled_scenes and self.files:
            raise UserError("set bundled_scenes or files, not both")
        if self.files and not self.files.annotations:
            raise UserError("files must name annotations: shards are for calibration only")


@dataclass(frozen=True)
class PrunedModel:
    """Model and weights of a pruning run, and how its calibration data is read.

    bundled: calibrate on the bundled images. batch_size: samples in a calibration batch. max_skipped: share of
    unreadable images that is tolerated. decoding: how image files become pictures.
    """

    model_config: str
    weights: str
    bundled: bool = False
    batch_size: int = 8
    workers: int = 1
    max_skipped: float = 0.01
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self):
        at_least(self, 1, "batch_size")
        at_least(self, 0, "workers")
        if not 0 <= self.max_skipped <= 1:
            raise UserError(f"max_skipped must be a fraction between 0 and 1, got {self.max_skipped!r}")

    @property
    def checkpoint(self) -> str | None:
        """Return the file with the weights; None for random ones."""
        return None if self.weights == "random" else self.weights

    @property
    def evaluated(self) -> dict[str, Any]:
        """Return what a table of evaluations says of how they were made."""
        return {}

    def learning(self) -> PrunedModel:
        """Return this configuration for training, which needs the precision of float32."""
        return self

    def check(self, where: str, evaluate: bool) -> None:
        """Raise UserError or FileNotFoundError for what is not there. where: the file of this configuration."""
        if self.model_config:
            read_yaml(self.model_config)
        self.check_weights()
        if evaluate:
            self.check_evaluation(where)

    def check_evaluation(self, where: str) -> None:
        """Raise UserError or FileNotFoundError where evaluation data is not configured or not there."""
        raise NotImplementedError

    def check_weights(self) -> None:
        """Raises FileNotFoundError where the file, or the folder with it, is not there."""
        if self.checkpoint is not None and not weights_files(self.checkpoint):
            way_out = "give --weights PATH, or --weights random"
            raise MissingFileError(f"{self.checkpoint}: weights file not found; {way_out}")


@dataclass(frozen=True)
class PruneConfig(PrunedModel):
    """Pruning of a model of images and texts: calibrated on `general` (image-text pairs) and `region` files, pairs in a
    general batch, images in a region batch; or on the bundled scenes. general_loader: a YAML file that names these
    files, see `configs.general_loader`. streams: places of the shards that are read at the same time, a multiple of
    devices x workers. dense_groups: modalities that stay dense; sparsities are those of the others.
    """

    # What decides the calibration batches.
    CALIBRATION: ClassVar = ("bundled", "general", "region", "batch_size", "decoding", "streams")

    general: list[Files] = field(default_factory=list)
    region: list[Files] = field(default_factory=list)
    general_loader: str = ""
    streams: int = 16
    dense_groups: list[str] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "streams")
        if self.general_loader:
            loader = load_config(self.general_loader, GeneralLoader)
            sources = {"general": loader.general, "region": loader.region}
            _take(self, loader, **{kind: [Files(*each, loader.roots) for each in own] for kind, own in sources.items()})
        if self.bundled and (self.general or self.region):
            raise UserError("set bundled: true, or give general and region files, not both")
        if not all(files.annotations for files in self.region):
            raise UserError("region files must name annotations: shards have no regions")

    def check_calibration(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where calibration data is not configured or not there."""
        if self.bundled:
            return
        if not self.general and not self.region:
            raise UserError(f"{where}: no calibration data: set bundled: true, or give general and region files")
        _check_loader(self)
        for files in (*self.general, *self.region):
            files.check()

    def check_evaluation(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.files:
            self.evaluation.files.check()
        elif not self.evaluation.bundled_scenes:
            raise UserError(f"{where}: no evaluation data: set evaluation.bundled_scenes or evaluation.files")

    @property
    def evaluated(self) -> dict[str, Any]:
        """Return what a table of evaluations says of how they were made."""
        return {"k_test": self.evaluation.k_test}

    def reranking(self, k_test: int) -> PruneConfig:
        """Return this configuration with an evaluation that re-ranks `k_test` candidates."""
        return replace(self, evaluation=replace(self.evaluation, k_test=k_test))


def _take(config: PruneConfig | LabelsPruneConfig, loader: GeneralLoader, **sources: Any) -> None:
    """Put what a general loader says into a configuration, which may say the same (as a saved one does) or nothing."""
    if not any(sources.values()):
        raise UserError(f"{config.general_loader}: names no data for this kind of model")
    for name, value in sources.items():
        if getattr(config, name) not in (None, [], value):
            raise UserError(f"set general_loader, or {' and '.join(sources)}, not both")
        object.__setattr__(config, name, value)
    if loader.batch_size is not None:
        object.__setattr__(config, "batch_size", loader.batch_size)


def _check_loader(config: PruneConfig | LabelsPruneConfig) -> None:
    """Raise UserError where a general loader is for another model."""
    if config.general_loader:
        loader = load_config(config.general_loader, GeneralLoader)
        loader.check_sizes(read_yaml(config.model_config), config.general_loader)


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
            raise UserError(f"bundled_split must be unseen or seen, got {self.bundled_split!r}")
        if self.bundled_images and self.images:
            raise UserError("set bundled_images or images, not both")


@dataclass(frozen=True)
class LabelsPruneConfig(PrunedModel):
    """Pruning of a classifier: calibrated on labelled `images`, or on the bundled glyphs. `weights` may also name a
    folder that transformers saved, or a repository on its hub. general_loader: a YAML file that names the folder of
    ImageNet, see `configs.general_loader`.
    """

    CALIBRATION: ClassVar = ("bundled", "images", "batch_size", "decoding")  # what decides the calibration batches

    images: LabelledImages | None = None
    general_loader: str = ""
    evaluation: LabelsEvaluation = field(default_factory=LabelsEvaluation)

    def __post_init__(self):
        super().__post_init__()
        if self.general_loader:
            loader = load_config(self.general_loader, GeneralLoader)
            _take(self, loader, images=LabelledImages("imagenet", "train", loader.root) if loader.root else None)
        if self.bundled and self.images:
            raise UserError("set bundled: true, or give images, not both")

    def check_weights(self) -> None:
        """Raises FileNotFoundError where nothing can be meant by `weights` but a file that is not there."""
        if not is_hosted(self.weights):
            super().check_weights()

    def check_calibration(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where calibration data is not configured or not there."""
        _check_loader(self)
        if self.images:
            self.images.check()
        elif not self.bundled:
            raise UserError(f"{where}: no calibration data: set bundled: true, or give images")

    def check_evaluation(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where evaluation data is not configured or not there."""
        if self.evaluation.images:
            self.evaluation.images.check()
        elif not self.evaluation.bundled_images:
            raise UserError(f"{where}: no evaluation data: set evaluation.bundled_images or evaluation.images")

    def reranking(self, k_test: int) -> LabelsPruneConfig:
        """Raises UserError where candidates are to be re-ranked, which is of retrieval."""
        if k_test:
            raise UserError("--k_test re-ranks the candidates of retrieval, and this model classifies: leave it out")
        return self


@dataclass(frozen=True)
class ExternalPruneConfig(PrunedModel):
    """Pruning of any other model, `timm:NAME`, `hf:NAME_OR_FOLDER` or `package.module:function`.

    weights: "published", "random", or a file, or a folder or index of shards; weights_key: where they stand in the
    file. dtype: what the model computes in, of `DTYPES`. img_size, model_kwargs: of models of timm, side of the images
    in pixels and further arguments. calibration: a folder of images, a file of texts, or a function of the user's that
    returns batches; max_tokens: of a row of texts; calibrate_on: which tokens of a language model count, of `TOKENS`.
    evaluate: whether quality is measured, on `evaluation`, which is as `calibration`, or else on a part of that, which
    is held out then. loss: a function that gives a batch's loss. Functions are given as package.module:function.
    class_map: a JSON file, {folder of images: class of the model}. include, exclude: globs over layers that are
    prunable and that are not. groups: name -> globs over its layers.
    """

    # What decides the calibration batches.
    CALIBRATION: ClassVar = (
        *("calibration", "calibrate_on", "class_map", "loss", "batch_size", "decoding", "max_tokens", "evaluate"),
        *("evaluation", "dtype"),
    )

    model_config: str = ""  # there is none
    weights: str = "published"
    workers: int = 0
    weights_key: str = ""
    dtype: str = "auto"
    img_size: int | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    calibration: str = ""
    calibrate_on: str = "all"
    max_tokens: int | None = None
    evaluate: bool = False
    evaluation: str = ""
    class_map: str = ""
    loss: str = ""
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "img_size", "max_tokens")
        for name, known in {"dtype": DTYPES, "calibrate_on": TOKENS}.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.loss and not FUNCTION.fullmatch(self.loss):
            raise UserError(f"loss must be package.module:function, got {self.loss!r}")

    def learning(self) -> ExternalPruneConfig:
        """Return this configuration in float32."""
        return replace(self, dtype="float32")

    @property
    def file(self) -> str | None:
        """The file with the weights; None for published and for random ones."""
        return None if self.weights == "published" else self.checkpoint

    def check_weights(self) -> None:
        """Raises FileNotFoundError where `weights` is a file that is not there."""
        if self.file:
            super().check_weights()

    def check_calibration(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where calibration data is not given or not there."""
        if not self.calibration:
            raise UserError(f"this pruner needs --calibration, {OWN_DATA}")
        self._check_data("calibration", self.calibration)
        if self.class_map and not Path(self.class_map).is_file():
            raise MissingFileError(f"--class_map {self.class_map}: there is no such file")

    def check_evaluation(self, where: str) -> None:
        """Raises UserError or FileNotFoundError where there is nothing to evaluate on."""
        if self.evaluation:
            self._check_data("evaluation", self.evaluation)
        elif self.calibration:
            self.check_calibration(where)
        else:
            told = f"give --evaluation, {OWN_DATA}; or --calibration, a part of which is held out"
            raise UserError(f"--evaluate: there is nothing to evaluate {self.model} on: {told}")

    def _check_data(self, option: str, path: str) -> None:
        texts = Path(path).is_file() and Path(path).suffix in TEXT_FILES
        if not (Path(path).is_dir() or texts or FUNCTION.fullmatch(path)):
            raise MissingFileError(f"--{option} {path}: neither a folder, a file of texts nor package.module:function")

    @property
    def evaluated(self) -> dict[str, Any]:
        """Return what a table of evaluations says of how they were made."""
        return {"evaluated on": self.evaluation or f"items of {self.calibration} that are not calibrated on"}

    def reranking(self, k_test: int) -> ExternalPruneConfig:
        """Raises UserError where candidates are to be re-ranked, which is of this project's models."""
        if k_test:
            raise UserError(f"--k_test re-ranks with a model of this project, not {self.model}: leave it out")
        return self


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
            raise UserError("set bundled: true, or give latents, not both")

    def check_calibration(self, where: str) -> None:
        """Raises FileNotFoundError where the file of latents is not there."""
        if self.latents and not Path(self.latents).is_file():
            raise MissingFileError(f"{self.latents}: there is no such file of latents; sample.py writes one")

    def check_evaluation(self, where: str) -> None:
        """Raises UserError where there is nothing to compare samples with."""
        if not (self.bundled and self.evaluation.samples):
            raise UserError(f"{where}: no evaluation data: set bundled: true and evaluation.samples")

    def reranking(self, k_test: int) -> NoisePruneConfig:
        """Raises UserError where candidates are to be re-ranked, which is of retrieval."""
        if k_test:
            raise UserError("--k_test re-ranks the candidates of retrieval, and this model draws: leave it out")
        return self


PRUNE_CONFIGS = {  # by kind of data
    "pairs": PruneConfig,
    "labels": LabelsPruneConfig,
    "noise": NoisePruneConfig,
    "external": ExternalPruneConfig,
}
