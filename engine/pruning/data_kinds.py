"""Parts of a pruning run that depend on a model and its data, one class for each kind of data: the prunable view,
calibration batches, and an evaluation that needs no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from configs.loading import load_config
from configs.pruning import LabelsPruneConfig, NoisePruneConfig, PruneConfig
from datasets.bundled.classification import BundledClassification
from datasets.bundled.generation import BundledGlyphs, Latents, check_pixels, read_latents
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.data_kinds import Calibration, LabelsCalibration, NoiseCalibration
from datasets.labelled.public import ClassificationDataset, check_classes, labelled
from datasets.text import TextEncoder
from datasets.transforms import IMAGENET, EvalTransform
from engine.evaluation.classification import Accuracy
from engine.evaluation.frechet import METRICS as FRECHET
from engine.evaluation.frechet import FrechetDistance
from engine.evaluation.retrieval import RECALLS, ZeroShot
from engine.generation.sampling import draw
from engine.pruning.external import External
from engine.ranks import place_of
from sparsity.view import PrunableView

DRAWN_IN = 50  # steps, of the samples that a model is calibrated on where there are no others


class Subject(Protocol):
    """metrics: column of a table -> key in what an evaluation returns. sizes: of the model, a dataclass."""

    metrics: Mapping[str, str]
    sizes: Any
    model: nn.Module

    def load(self, fabric: Any) -> PrunableView:
        """Build the model on the device, once; to be called before the others."""

    def calibration(self, folder: Path, num_batches: int, seed: int) -> Iterable[Any]:
        """This rank's batches of epoch 0, with `at(epoch)` and `numbers` as
        `datasets.calibration.data_kinds.Calibration` has them. folder: where unreadable images are listed.
        """

    def evaluation(self, folder: Path) -> Callable[[], dict[str, float]]:
        """Measures the model as it is when this is called."""


class Pairs:
    """A model of images and texts: calibrated on image-text pairs, measured by zero-shot retrieval.

    module: of models/, with `Config`, `build`, `prunable_view`, `tokenizer`, `TEXT` and `REGIONS`.
    """

    metrics = RECALLS

    def __init__(self, module: ModuleType, config: PruneConfig):
        self.module, self.config = module, config
        self.sizes = load_config(config.model_config, module.Config)
        self.encode = TextEncoder(module.tokenizer(self.sizes), self.sizes.max_tokens, **module.TEXT)

    def load(self, fabric: Any) -> PrunableView:
        self.fabric = fabric
        self.model = self.module.build(self.sizes, self.config.checkpoint).to(fabric.device).eval()
        return self.module.prunable_view(self.model).without(self.config.dense_groups)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> Calibration:
        what = {"place": place_of(self.fabric), "regions": self.module.REGIONS}
        return Calibration(self.config, self.encode, self.sizes.vision, folder, num_batches, seed, **what)

    def evaluation(self, folder: Path) -> ZeroShot:
        reading = {name: getattr(self.config, name) for name in ("workers", "max_skipped", "decoding")}
        evaluation = self.config.evaluation
        return ZeroShot(self.model, evaluation, self.encode, self.fabric, self.sizes.vision, folder, **reading)


class Labels:
    """A classifier: calibrated on labelled images, measured by its accuracy.

    module: of models/, with `Config`, `build` and `prunable_view`.
    """

    metrics = {"top-1": "top1", "top-5": "top5"}

    def __init__(self, module: ModuleType, config: LabelsPruneConfig):
        self.module, self.config = module, config
        self.sizes = load_config(config.model_config, module.Config)

    def load(self, fabric: Any) -> PrunableView:
        self.fabric = fabric
        self.model = self.module.build(self.sizes, self.config.checkpoint).to(fabric.device).eval()
        return self.module.prunable_view(self.model)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> LabelsCalibration:
        return LabelsCalibration(self.config, self.sizes, folder, num_batches, seed, place_of(self.fabric))

    def evaluation(self, folder: Path) -> Accuracy:
        reading = {"workers": self.config.workers, "max_skipped": self.config.max_skipped}
        data = self._tested()
        check_classes(len(data.class_names), self.sizes.classes)
        return Accuracy(self.model, data, self.fabric, folder, **reading)

    def _tested(self) -> ClassificationDataset | BundledClassification:
        evaluation, side = self.config.evaluation, self.sizes.image_size
        if evaluation.images:
            reading = {"seed": 0, "decoding": self.config.decoding}
            return labelled(evaluation.images, EvalTransform(side, IMAGENET), **reading)
        return BundledClassification(load_glyphs(), evaluation.bundled_split, evaluation.bundled_images, side=side)


class Noise:
    """A model that draws by removing noise: calibrated on samples with noise, measured by the Frechet distance of what
    it draws from the bundled glyphs.

    module: of models/, with `Config`, `build`, `prunable_view` and `JUDGE`, the module of the classifier whose features
    count. sizes: of the model; default: those in the file that the configuration names.
    """

    metrics = FRECHET

    def __init__(self, module: ModuleType, config: NoisePruneConfig, sizes: Any = None):
        self.module, self.config = module, config
        self.sizes = sizes or load_config(config.model_config, module.Config)
        if config.bundled:
            check_pixels(self.sizes, config.model_config)
            self.glyphs = BundledGlyphs(load_glyphs(), self.sizes.image_size)
            check_classes(len(self.glyphs.class_names), self.sizes.classes)

    def load(self, fabric: Any, **options: Any) -> PrunableView:
        """options: further ones of the module's `build`."""
        self.fabric = fabric
        self.model = self.module.build(self.sizes, self.config.checkpoint, **options).to(fabric.device).eval()
        return self.module.prunable_view(self.model)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> NoiseCalibration:
        data = self._samples(num_batches * self.config.batch_size, seed)
        return NoiseCalibration(self.config, data, self.sizes, folder, num_batches, seed, place_of(self.fabric))

    def _samples(self, number: int, seed: int) -> Dataset:
        if self.config.bundled:
            return self.glyphs
        if self.config.latents:
            return read_latents(self.config.latents, self.sizes)
        labels = torch.randint(self.sizes.classes, (number,), generator=torch.Generator().manual_seed(seed))
        drawn = draw(self.model, labels.tolist(), self.fabric, seed=seed, steps=DRAWN_IN)
        return Latents(drawn, labels)

    def evaluation(self, folder: Path) -> FrechetDistance:
        asked, judge = self.config.evaluation, self.module.JUDGE
        judge = judge.build(load_config(asked.judge_config, judge.Config), asked.judge_weights).to(self.fabric.device)
        options = {"steps": asked.steps, "scale": asked.guidance}
        return FrechetDistance(self.model, judge, self.glyphs, asked.samples, self.fabric, **options)


SUBJECTS: dict[str, type[Subject]] = {  # by models.kind
    "pairs": Pairs,
    "labels": Labels,
    "noise": Noise,
    "external": External,
}
