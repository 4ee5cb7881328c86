"""The images that image_classification.py trains and tests on."""

from __future__ import annotations

from torch.utils.data import Dataset, Subset

from configs.finetuning import CLASSIFICATION, ClassificationConfig
from configs.sources import LabelledImages
from configs.task import DEBUG_IMAGES
from datasets.bundled.classification import BundledClassification
from datasets.bundled.glyphs import load_glyphs
from datasets.labelled.cifar import READERS, CifarDataset
from datasets.labelled.own_folder import Transform, own_folder
from datasets.labelled.public import ClassificationDataset, labelled
from datasets.labelled.unlabelled import UnlabelledImages
from datasets.transforms import FINETUNING_SCALE, IMAGENET, EvalTransform, TrainTransform

Images = BundledClassification | CifarDataset | ClassificationDataset | UnlabelledImages


def class_names(config: ClassificationConfig, unlabelled: bool = False) -> tuple[str, ...]:
    """Return the names of the labels 0, 1, ...; none of images that have no labels. Arguments as of `training_set`."""
    if config.own:
        return own_folder(config.dataset, config.val_fraction, unlabelled).class_names
    return tuple(training_set(config, side=1, seed=0).class_names)


def training_set(
    config: ClassificationConfig, side: int, seed: int, transform: Transform | None = None, unlabelled: bool = False
) -> Images:
    """Return the data that is trained on, indexed by running numbers.

    side: of the images, in pixels. transform: RGB image and generator -> tensor; the bundled glyphs have their own.
    unlabelled: labels are not read, so that images of a folder of the user's need not lie in class folders. Raises
    OSError or UserError where the files are not there or not as expected.
    """
    if config.dataset == "bundled":
        return BundledClassification(load_glyphs(), "train", config.bundled.train_images, side=side, seed=seed)
    transform = transform or TrainTransform(side, FINETUNING_SCALE, statistics=IMAGENET)
    return _public(config, "train", transform, seed, unlabelled)


def evaluation_sets(
    config: ClassificationConfig,
    side: int,
    debug: bool = False,
    transform: Transform | None = None,
    unlabelled: bool = False,
) -> dict[str, Dataset]:
    """By name: "val", by which the best weights are chosen, then what is tested on. Only the bundled glyphs and folders
    with test/ have both: elsewhere nothing is chosen by what is tested on. debug: a few images of each. unlabelled: as
    of `training_set`.
    """
    transform = transform or EvalTransform(side, IMAGENET)
    if config.own:
        reading = {"transform": transform, "decoding": config.decoding}
        folder = own_folder(config.dataset, config.val_fraction, unlabelled)
        names = {"val": "val", "test": "test"} if "test" in folder.parts else {"test": "val"}
        sets = {name: folder.dataset(part, **reading) for name, part in names.items()}
    elif config.dataset == "bundled":
        bundled, glyphs = config.bundled, load_glyphs()
        sets = {"val": BundledClassification(glyphs, "seen", bundled.val_images, side=side, seed=1)}
        sets |= {split: BundledClassification(glyphs, split, bundled.test_images, side=side) for split in bundled.test}
    else:
        sets = {"test": _public(config, "test", transform, 0)}
    return {name: Subset(data, range(min(DEBUG_IMAGES, len(data)))) if debug else data for name, data in sets.items()}


def _public(
    config: ClassificationConfig, split: str, transform: Transform, seed: int, unlabelled: bool = False
) -> Images:
    if config.own:
        folder = own_folder(config.dataset, config.val_fraction, unlabelled)
        return folder.dataset(split, transform, seed=seed, decoding=config.decoding)
    if config.dataset in READERS:
        return CifarDataset(config.dataset, split == "train", transform, seed=seed, root=config.folder)
    part = dict(zip(("train", "test"), CLASSIFICATION[config.dataset], strict=True))[split]
    images = LabelledImages(config.dataset, part, config.folder)
    return labelled(images, transform, seed=seed, decoding=config.decoding)
