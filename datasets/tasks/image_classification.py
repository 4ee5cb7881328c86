"""The images that image_classification.py trains and tests on."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import Dataset, Subset

from configs.finetuning import CLASSIFICATION, ClassificationConfig
from configs.sources import LabelledImages
from configs.task import DEBUG_IMAGES
from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import load_glyphs
from datasets.labelled.cifar import READERS, CifarDataset
from datasets.labelled.public import ClassificationDataset, labelled
from datasets.transforms import FINETUNING_SCALE, IMAGENET, EvalTransform, TrainTransform

Labelled = BundledClassification | CifarDataset | ClassificationDataset


def training_set(config: ClassificationConfig, side: int, seed: int) -> Labelled:
    """What is trained on, indexed by running numbers; `class_names` are those of its labels.

    side: of the images, in pixels. Raises OSError or UserError where the files are not there or not as expected.
    """
    if config.dataset == "bundled":
        return BundledClassification(load_glyphs(), "train", config.bundled.train_images, side=side, seed=seed)
    return _public(config, "train", TrainTransform(side, FINETUNING_SCALE, statistics=IMAGENET), seed)


def evaluation_sets(config: ClassificationConfig, side: int, debug: bool = False) -> dict[str, Dataset]:
    """By name: "val", by which the best weights are chosen and which only the bundled glyphs have, then what is tested
    on. debug: a few images of each.
    """
    if config.dataset == "bundled":
        bundled, glyphs = config.bundled, load_glyphs()
        sets = {"val": BundledClassification(glyphs, "seen", bundled.val_images, side=side, seed=1)}
        sets |= {split: BundledClassification(glyphs, split, bundled.test_images, side=side) for split in bundled.test}
    else:
        sets = {"test": _public(config, "test", EvalTransform(side, IMAGENET), 0)}
    return {name: Subset(data, range(min(DEBUG_IMAGES, len(data)))) if debug else data for name, data in sets.items()}


def _public(config: ClassificationConfig, split: str, transform: Callable, seed: int) -> Labelled:
    if config.dataset in READERS:
        return CifarDataset(config.dataset, split == "train", transform, seed=seed, root=config.folder)
    part = dict(zip(("train", "test"), CLASSIFICATION[config.dataset], strict=True))[split]
    images = LabelledImages(config.dataset, part, config.folder)
    return labelled(images, transform, seed=seed, decoding=config.decoding)
