"""What a pruning script needs of a model together with its data, one class for each kind of data: the prunable view,
calibration batches, and an evaluation that needs no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from torch import nn

from datasets.bundled import load_glyphs
from datasets.bundled_classification import BundledClassification
from datasets.calibration import Calibration, LabelsCalibration
from datasets.classification import ClassificationDataset, check_classes, labelled
from datasets.sources import LabelsPruneConfig, PruneConfig
from datasets.text import TextEncoder
from datasets.transforms import IMAGENET, EvalTransform
from engine.classification import Accuracy
from engine.config import load_config
from engine.external import External
from engine.retrieval import RECALLS, ZeroShot
from sparsity.view import PrunableView


class Subject(Protocol):
    """metrics: column of a table -> key in what an evaluation returns. sizes: of the model, a dataclass."""

    metrics: Mapping[str, str]
    sizes: Any
    model: nn.Module

    def load(self, fabric: Any) -> PrunableView:
        """Build the model on the device, once; to be called before the others."""

    def calibration(self, folder: Path, num_batches: int, seed: int) -> Iterable[Any]:
        """This rank's batches of epoch 0, with `at(epoch)` and `numbers` as `datasets.calibration.Calibration` has
        them. folder: where unreadable images are listed.
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
        return self.module.prunable_view(self.model)

    def calibration(self, folder: Path, num_batches: int, seed: int) -> Calibration:
        place = {"rank": self.fabric.global_rank, "world_size": self.fabric.world_size}
        what = {"num_batches": num_batches, "seed": seed, "regions": self.module.REGIONS}
        return Calibration(self.config, self.encode, self.sizes.vision, folder, **what, **place)

    def evaluation(self, folder: Path) -> ZeroShot:
        reading = {"workers": self.config.workers, "max_skipped": self.config.max_skipped}
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
        place = {"rank": self.fabric.global_rank, "world_size": self.fabric.world_size}
        return LabelsCalibration(self.config, self.sizes, folder, num_batches, seed, **place)

    def evaluation(self, folder: Path) -> Accuracy:
        reading = {"workers": self.config.workers, "max_skipped": self.config.max_skipped}
        data = self._tested()
        check_classes(len(data.class_names), self.sizes.classes)
        return Accuracy(self.model, data, self.fabric, folder, **reading)

    def _tested(self) -> ClassificationDataset | BundledClassification:
        evaluation, side = self.config.evaluation, self.sizes.image_size
        if evaluation.images:
            return labelled(evaluation.images, EvalTransform(side, IMAGENET), seed=0)
        return BundledClassification(load_glyphs(), evaluation.bundled_split, evaluation.bundled_images, side=side)


SUBJECTS: dict[str, type[Subject]] = {"pairs": Pairs, "labels": Labels, "external": External}  # by models.kind
