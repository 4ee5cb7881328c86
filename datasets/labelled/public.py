"""Labelled images: ImageNet's folders and Oxford Flowers102, in the public layouts."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.decoding import Decoding
from configs.sources import LabelledImages
from datasets.annotations import HOW_TO_GET, ImageRoot, Records
from datasets.collate import Skipped
from datasets.images import DEFAULT
from datasets.labelled.class_folders import class_folders, image_files
from datasets.sampler import sample_generator
from sparsity.errors import MissingFileError, UserError

log = logging.getLogger(__name__)
FLOWERS_SPLITS = {"train": ("train", "val"), "test": ("test",)}  # train and val together train


class ClassificationDataset(Dataset):
    """Images with one label each; `imagenet` and `flowers102` make such datasets.

    It is indexed by a running number n = epoch * len(dataset) + index, and an item is {"image": (3, H, W), "label": ()
    int64}, or `Skipped` where the image cannot be read. Batches: `collate`.

    Args:
        root: folder of the images.
        samples: pairs of image path in `root` and label.
        class_names: of the labels 0, 1, ...
        transform: (RGB image, generator) -> tensor.
        seed: of all that is drawn.
        decoding: how image files become pictures.

    Raises:
        FileNotFoundError: the folder is missing, or none of the images looked up is in it.
    """

    def __init__(
        self,
        root: str | Path,
        samples: Sequence[tuple[str, int]],
        class_names: Sequence[str],
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        *,
        seed: int,
        decoding: Decoding = DEFAULT,
    ):
        self.root, self.class_names = ImageRoot(root, decoding), tuple(class_names)
        self.transform, self.seed = transform, seed
        self.records = Records(samples)
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        path, label = self.records[index]
        image = self.root.load(path)
        if isinstance(image, Skipped):
            return image
        return {"image": self.transform(image, rng), "label": torch.tensor(label)}


def imagenet(
    split: str,
    transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
    *,
    seed: int,
    root: str | Path = "data/imagenet",
    decoding: Decoding = DEFAULT,
) -> ClassificationDataset:
    """`{root}/{split}/<synset>/*.JPEG` with the class names of `{root}/annots/metadata.csv` (folder_name, class_name).

    Labels count the synsets of the file in alphabetical order, as `torchvision.datasets.ImageFolder` counts folders: a
    split in which some are missing keeps the labels of the others.

    Raises:
        FileNotFoundError: the split or the file is missing.
        UserError: the file is not as expected, a folder is not in it, or there is no image.
    """
    table = Path(root, "annots", "metadata.csv")
    names = dict(_rows(table, "folder_name", "class_name"))
    synsets = {synset: label for label, synset in enumerate(sorted(names))}
    folder = ImageRoot(Path(root, split)).root
    samples = []
    for synset in class_folders(folder):
        if synset not in synsets:
            raise UserError(f"{folder / synset}: this folder is no class of {table}; {HOW_TO_GET}")
        samples += [(f"{synset}/{name}", synsets[synset]) for name in image_files(folder / synset)]
    if not samples:
        raise UserError(f"{folder}: no image found; expected <synset>/*.JPEG; {HOW_TO_GET}")
    missing = len(synsets) - len({label for _, label in samples})
    if missing:
        log.info("%s has no image of %d of %d classes", folder, missing, len(synsets))
    class_names, reading = [names[synset] for synset in synsets], {"seed": seed, "decoding": decoding}
    return ClassificationDataset(folder, samples, class_names, transform, **reading)


def flowers102(
    split: str,
    transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
    *,
    seed: int,
    root: str | Path = "data/flowers102",
    decoding: Decoding = DEFAULT,
) -> ClassificationDataset:
    """`{root}/images` by `{root}/annots/split.csv` (filename, class, split) and `metadata.csv` (idx, class_name).

    `split` is "train" (the file's train and val) or "test". The column `class` holds an idx or a class name of the
    metadata; labels count the idx in rising order.

    Raises:
        FileNotFoundError: a file or the folder is missing, or none of the images looked up is in it.
        UserError: a file is not as expected, or `split` is neither.
    """
    if split not in FLOWERS_SPLITS:
        raise UserError(f"the split of Flowers102 must be one of {', '.join(FLOWERS_SPLITS)}, got {split!r}")
    classes, table = Path(root, "annots", "metadata.csv"), Path(root, "annots", "split.csv")
    names = dict(sorted((_number(classes, idx), name) for idx, name in _rows(classes, "idx", "class_name")))
    labels = {name: label for label, name in enumerate(names.values())}
    labels |= {str(idx): label for label, idx in enumerate(names)}
    samples = []
    for path, kind, part in _rows(table, "filename", "class", "split"):
        if kind not in labels:
            raise UserError(f"{table}: {path} has the class {kind!r}, which is not in {classes}; {HOW_TO_GET}")
        if not any(part in parts for parts in FLOWERS_SPLITS.values()):
            raise UserError(f"{table}: {path} has the split {part!r}; expected train, val or test; {HOW_TO_GET}")
        if part in FLOWERS_SPLITS[split]:
            samples.append((path, labels[kind]))
    if not samples:
        raise UserError(f"{table}: no image of the split {split!r}; {HOW_TO_GET}")
    reading = {"seed": seed, "decoding": decoding}
    dataset = ClassificationDataset(Path(root, "images"), samples, list(names.values()), transform, **reading)
    dataset.root.check(table, [path for path, _ in samples])
    return dataset


def labelled(
    images: LabelledImages,
    transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
    *,
    seed: int,
    decoding: Decoding = DEFAULT,
) -> ClassificationDataset:
    """The data that a configuration names; raises as `imagenet` and `flowers102`."""
    opened = {"imagenet": imagenet, "flowers102": flowers102}[images.dataset]
    return opened(images.split, transform, seed=seed, root=images.folder, decoding=decoding)


def check_classes(found: int, expected: int) -> None:
    """Raise UserError where the data has another number of classes than the model."""
    if found != expected:
        raise UserError(
            f"the data has {found} classes and the model {expected}: set `classes` of the model, or its data"
        )


def _number(path: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{path}: idx must be a whole number, got {text!r}; {HOW_TO_GET}") from None


def _rows(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """These columns of a CSV file with a header, the first one without repetition.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a column is missing or empty somewhere, there is no row, or a first value is there twice.
    """
    expected = f"expected a CSV file with the columns {','.join(columns)}; {HOW_TO_GET}"
    if not path.is_file():
        raise MissingFileError(f"{path}: file not found; {expected}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            found = reader.fieldnames or ()
            rows = [tuple((row.get(column) or "").strip() for column in columns) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file ({error}); {expected}") from None
    missing = [column for column in columns if column not in found]
    if missing or not rows:
        raise UserError(f"{path}: no {f'column {missing[0]!r}' if missing else 'row'}; {expected}")
    seen = set()
    for number, row in enumerate(rows, 1):
        if not all(row) or row[0] in seen:
            fault = f"{columns[0]} {row[0]!r} is there twice" if all(row) else f"a column of {row!r} is empty"
            raise UserError(f"{path}: row {number}: {fault}; {expected}")
        seen.add(row[0])
    return rows
