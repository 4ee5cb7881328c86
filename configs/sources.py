"""Files and labelled images that configurations name, in the public layouts, and what weights may be called."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.locations import located
from configs.shard_names import is_pattern, shard_paths
from sparsity.errors import MissingFileError, UserError

HOW_TO_GET = "docs/datasets.md says how to get the annotations and images"
LABELLED = {"imagenet": "{split}", "flowers102": "images"}  # public sets -> where the images of a split are
FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")  # package.module:function
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # on a hub: owner/name
TEXT_FILES = (".txt", ".jsonl")  # what ends like this holds texts
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # what ends like this is a file, there or not


def at_least(config: Any, minimum: int, *names: str) -> None:
    """Raise UserError where one of these fields is set and less."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, got {value!r}")


def is_hosted(weights: str) -> bool:
    """Whether this is a folder that transformers saved, or may name a repository on its hub."""
    repository = REPOSITORY.fullmatch(weights) and Path(weights).suffix not in WEIGHTS_SUFFIXES
    return bool(repository) or Path(weights).is_dir()


IMAGENET = "data/imagenet"
_TRAINED_ON = {"vit_mini": "bundled"}  # models of timm that know other images than ImageNet's


def images_of(model: str) -> str:
    """The data path of a model of timm where none is given."""
    return _TRAINED_ON.get(model, located(IMAGENET))


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
            raise UserError("images must name a folder, or shards such as images/cc3m/{00000..00331}.tar")
        if self.annotations and is_pattern(self.images):
            raise UserError(f"images {self.images} are shards, which hold their captions: leave annotations out")
        if self.roots and not self.annotations:
            raise UserError("roots are for annotation files: leave them out, or give annotations")

    @property
    def folders(self) -> str | dict[str, str]:
        """The image folder, or the folders by a record's "dataset", "" for any other."""
        return {**self.roots, "": self.images} if self.roots else self.images

    def check(self) -> None:
        """Raises FileNotFoundError, naming what is missing, or UserError for a pattern that cannot be."""
        if not self.annotations:
            shard_paths(self.images)
            return
        if not Path(self.annotations).is_file():
            raise MissingFileError(f"{self.annotations}: annotation file not found; {HOW_TO_GET}")
        if not Path(self.images).is_dir():
            raise MissingFileError(f"{self.images}: image folder not found; {HOW_TO_GET}")


@dataclass(frozen=True)
class LabelledImages:
    """A split of a public set of labelled images, in its own layout under `root` (default: data/<dataset>)."""

    dataset: str
    split: str
    root: str = ""

    def __post_init__(self):
        if self.dataset not in LABELLED:
            raise UserError(f"dataset must be one of {', '.join(LABELLED)}, got {self.dataset!r}")

    @property
    def folder(self) -> Path:
        return Path(self.root or located(f"data/{self.dataset}"))

    @property
    def images(self) -> Path:
        """Return the folder of the images."""
        return self.folder / LABELLED[self.dataset].format(split=self.split)

    @property
    def classes(self) -> Path:
        """Return the file with the names of the classes."""
        return self.folder / "annots" / "metadata.csv"

    def check(self) -> None:
        """Raises FileNotFoundError, naming what is missing."""
        if not self.classes.is_file():
            raise MissingFileError(f"{self.classes}: file not found; {HOW_TO_GET}")
        if not self.images.is_dir():
            raise MissingFileError(f"{self.images}: image folder not found; {HOW_TO_GET}")
