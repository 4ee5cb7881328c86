"""Data of pretrain.py, one class for each kind of data: the curriculum and the validation."""

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from configs.loading import load_config
from configs.pretraining import LabelsPretrainConfig, NoisePretrainConfig, PretrainConfig
from configs.pruning import Evaluation
from datasets.bundled.classification import BundledClassification
from datasets.bundled.curriculum import Curriculum, LabelledCurriculum, NoisedCurriculum
from datasets.bundled.generation import BundledGlyphs, Noised, check_pixels
from datasets.bundled.glyphs import load_glyphs
from datasets.labelled.public import check_classes
from datasets.text import TextEncoder
from engine.evaluation.classification import Accuracy
from engine.evaluation.retrieval import ZeroShot
from engine.generation.sampling import Denoised

VALIDATION_SEED = 1000


class Pairs:
    """Scenes with captions, validated by zero-shot retrieval.

    module: of models/, with `Config`, `OBJECTIVES`, `tokenizer` and `TEXT`. where: the configuration file, for
    messages. `options` are those of what `models.parts.pretraining` puts around the model. Raises UserError for
    objectives that the model does not have.
    """

    unused_parameters = True  # not every loss is asked for in each step

    def __init__(self, module: ModuleType, config: PretrainConfig, where: str, seed: int):
        for stage in config.stages:
            stage.check(module.OBJECTIVES, where)
        self.sizes = load_config(config.model_config, module.Config)
        self.encode = TextEncoder(module.tokenizer(self.sizes), self.sizes.max_tokens, **module.TEXT)
        self.data = Curriculum(config, load_glyphs(), self.encode, self.sizes.vision, seed=seed)
        self.evaluation = Evaluation(k_test=0, bundled_scenes=config.validation_scenes)
        self.options: dict[str, Any] = {}

    def validation(self, model: nn.Module, fabric: Any, folder: Path) -> ZeroShot:
        return ZeroShot(model, self.evaluation, self.encode, fabric, self.sizes.vision, folder)


class Labels:
    """Single glyphs with labels, validated by the accuracy on the font that is not trained on. Raises UserError for a
    model with another number of classes.
    """

    unused_parameters = False

    def __init__(self, module: ModuleType, config: LabelsPretrainConfig, where: str, seed: int):
        self.sizes, self.images = load_config(config.model_config, module.Config), config.validation_images
        self.glyphs = load_glyphs()
        check_classes(len(set(self.glyphs.subcategories)), self.sizes.classes)
        self.data = LabelledCurriculum(config, self.glyphs, self.sizes.image_size, seed=seed)
        self.options = {"fine_classes": len(self.glyphs), "label_smoothing": config.label_smoothing}

    def validation(self, model: nn.Module, fabric: Any, folder: Path) -> Accuracy:
        unseen = BundledClassification(self.glyphs, "unseen", self.images, side=self.sizes.image_size)
        return Accuracy(model, unseen, fabric, folder)


class Noise:
    """Single glyphs with noise, validated by the loss and by pictures of samples, samples_<n>.png. Raises
    UserError for a model of latents, or with another number of classes.
    """

    unused_parameters = False

    def __init__(self, module: ModuleType, config: NoisePretrainConfig, where: str, seed: int):
        self.sizes, self.config = load_config(config.model_config, module.Config), config
        self.images = BundledGlyphs(load_glyphs(), self.sizes.image_size)
        check_pixels(self.sizes, str(config.model_config))
        check_classes(len(self.images.class_names), self.sizes.classes)
        self.data = NoisedCurriculum(config, self._noised(self.images, self.sizes.class_dropout, seed), seed=seed)
        self.options = {"decay": config.decay}

    def _noised(self, images: Dataset, dropout: float, seed: int) -> Noised:
        return Noised(images, null_class=self.sizes.null_class, dropout=dropout, seed=seed)

    def validation(self, model: nn.Module, fabric: Any, folder: Path) -> Denoised:
        """model: the moving average."""
        spread = range(0, len(self.images), max(1, len(self.images) // self.config.validation_images))
        data = self._noised(Subset(self.images, spread), 0.0, VALIDATION_SEED)
        labels = [int(data[n]["label"]) for n in range(0, len(data), max(1, len(data) // self.config.pictures))]
        return Denoised(model, data, labels[: self.config.pictures], self.config.sampling_steps, fabric, folder)


PRETRAINING = {"pairs": Pairs, "labels": Labels, "noise": Noise}  # by the kinds in models.KINDS
