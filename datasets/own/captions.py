"""A user's own images with captions: a JSON or JSON Lines file, a folder, or WebDataset shards (docs/data.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from configs.decoding import Decoding
from configs.shard_names import is_pattern, shard_paths
from configs.task import OwnDataConfig
from datasets.annotations import ImageRoot, get_path, get_texts
from datasets.images import DEFAULT
from datasets.labelled.class_folders import images_below
from datasets.labelled.image_folder import CAPTIONS, captions_beside
from datasets.own.images import Packed, ShardImages, Source, packed
from datasets.own.records import HOW, Fault, parsed, rows, whole
from datasets.splits import split
from sparsity.errors import MissingFileError, UserError

EXPECTED = '{"image": path, "caption": text or [texts]}'


class Captioned(NamedTuple):
    """An image and its captions. image: as its source finds it. where: the file and number of the record."""

    image: str
    captions: list[str]
    where: str = ""


@dataclass(frozen=True)
class CaptionedImages:
    """Images, each once, with all captions that they have. path: what they were read from."""

    path: str
    records: Sequence[Captioned]
    images: Source

    @property
    def names(self) -> list[str]:
        """Return the names of the images in results."""
        images = [record.image for record in self.records]
        return list(map(ShardImages.name, images)) if isinstance(self.images, ShardImages) else images


def captioned_rows(path: str, decoding: Decoding = DEFAULT) -> tuple[Iterator[Captioned | Fault], Source]:
    """Return the records of a file, a folder or shards as they are read, and where their images are.

    Paths of images are relative to the folder of the file. Raises FileNotFoundError or UserError where there is
    nothing to read.
    """
    where = Path(path)
    if is_pattern(path) or (where.is_dir() and any(where.glob("*.tar"))):
        samples = chain.from_iterable(map(packed, shard_paths(path)))
        return (_of_shard(sample) for sample in samples), ShardImages(decoding)
    if where.is_dir():
        listed = next((where / name for name in (CAPTIONS, "captions.jsonl") if (where / name).is_file()), None)
        if listed is None:
            return _beside(where), ImageRoot(where, decoding)
        where = listed
    return parsed(rows(where, EXPECTED), _captioned, EXPECTED), ImageRoot(where.parent, decoding)


def read_captions(path: str, decoding: Decoding = DEFAULT) -> CaptionedImages:
    """Read a user's images with captions. Raises UserError or FileNotFoundError, which name file and record, where
    something is wrong with one, and where none of the images that are looked up is there.
    """
    found, images = captioned_rows(path, decoding)
    captions: dict[str, list[str]] = {}
    for record in whole(found):
        captions.setdefault(record.image, []).extend(record.captions)
    if not captions:
        raise UserError(f"{path}: no image with a caption; {HOW}")
    if isinstance(images, ImageRoot):
        images.check(path, list(captions))
    return CaptionedImages(path, [Captioned(image, texts) for image, texts in captions.items()], images)


def own_captions(config: OwnDataConfig) -> tuple[CaptionedImages, CaptionedImages | None]:
    """Return what a configuration trains and validates on, no image in both; None where nothing is held out."""
    assert config.data, "this configuration has other data"
    own = read_captions(config.data, config.decoding)
    if config.val_data:
        return own, read_captions(config.val_data, config.decoding)
    train, held = split(own.records, config.val_fraction, own.path)
    part = CaptionedImages(own.path, held, own.images) if held else None
    return CaptionedImages(own.path, train, own.images), part


def _captioned(record: dict, where: str) -> Captioned:
    return Captioned(get_path(record), get_texts(record, "caption"), where)


def _of_shard(sample: Packed | Fault) -> Captioned | Fault:
    return (
        sample
        if isinstance(sample, Fault)
        else Captioned(sample.image, [sample.caption], sample.image.partition("#")[0])
    )


def _beside(folder: Path) -> Iterator[Captioned | Fault]:
    """Yield the images of a folder with the captions in the text file of the same name."""
    paths = images_below(folder)
    if not paths:
        raise MissingFileError(f"{folder}: neither {CAPTIONS} nor an image in this folder; {HOW}")
    for path in paths:
        try:
            captions = captions_beside(folder / path)
        except UserError as error:
            yield Fault(str(folder / path), str(error))
            continue
        missing = f"no caption: {(folder / path).with_suffix('.txt').name} is not there, or empty"
        yield Captioned(path, captions, str(folder)) if captions else Fault(str(folder / path), missing)
