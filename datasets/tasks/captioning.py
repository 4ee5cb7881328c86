"""Captioning: what is trained on, and the images to describe with the captions that people gave them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.finetuning import CaptioningConfig
from configs.task import DEBUG_IMAGES
from datasets.annotations import HOW_TO_GET, get_id, get_text, read_json, shown
from datasets.bundled.captions import varied_caption
from datasets.bundled.glyphs import image_tensor, load_glyphs
from datasets.bundled.scenes import BundledRetrieval, BundledScenes
from datasets.collate import Skipped
from datasets.own.captions import own_captions
from datasets.own.sets import OwnImages, OwnPairs
from datasets.sampler import sample_generator
from datasets.tasks.retrieval import RetrievalEvalDataset, RetrievalTrainDataset, as_item
from datasets.text import TextEncoder
from datasets.transforms import FINETUNING_SCALE, EvalTransform, TrainTransform
from sparsity.errors import UserError

log = logging.getLogger(__name__)
EXPECTED = '{"annotations": [{"image_id": number, "caption": text}]}'
REFERENCES = 5  # captions of a bundled scene, as many as COCO has of an image


class Described(Protocol):
    """Images to describe: item i is {"image": (3, H, W), "index": i}, or `Skipped` where it cannot be read.

    Attributes:
        ids: number, or name, of each image.
        references: the captions that each image has, in the same order.
    """

    ids: Sequence[int | str]
    references: Sequence[Sequence[str]]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | Skipped: ...


class CaptioningEvalDataset(RetrievalEvalDataset):
    """The images of an annotation file such as `coco_karpathy_test.json`; see `Described`.

    Their ids are the `image_id` of the records; where these have none, COCO's, the digits at the end of the file name;
    and where not every name ends in digits of its own, running numbers from 0. With `gt_file`, whose references are
    found by them, they are never running numbers.

    Args:
        gt_file: COCO caption file with the references; those of the annotation file where None.
        options: those of `RetrievalEvalDataset`.

    Raises:
        FileNotFoundError: a file or the folder is missing, or none of the images looked up is in the folder.
        UserError: a file is not as expected, or an image has no number, that of another, or no reference.
    """

    def __init__(self, annotation_file: str | Path, *options: Any, gt_file: str | Path | None = None, **named: Any):
        super().__init__(annotation_file, *options, **named)
        self.ids = _ids(annotation_file, self.images, self.image_ids, running=gt_file is None)
        self.references = [[self.texts[t] for t in own] for own in self.img2txt]
        if gt_file is not None:
            known = read_references(gt_file)
            missing = [i for i in self.ids if i not in known]
            if missing:
                raise UserError(f"{gt_file}: no caption of image {missing[0]}, which {annotation_file} has")
            self.references = [known[i] for i in self.ids]


class BundledCaptions(BundledRetrieval):
    """Fixed scenes, each with `REFERENCES` true captions of changing form; see `Described`.

    Options are those of `BundledRetrieval`.
    """

    @property
    def ids(self) -> Sequence[int]:
        return range(len(self))

    @cached_property
    def references(self) -> list[list[str]]:
        found = []
        for i in range(len(self)):
            scene, (_, rng) = self.scene(i), sample_generator(i, len(self), self.seed)
            others = (varied_caption(scene.objects, rng) for _ in range(REFERENCES - 1))
            found.append([scene.caption, *others])
        return found

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"image": image_tensor(self.scene(i).image), "index": torch.tensor(i)}


def read_references(path: str | Path) -> dict[int | str, list[str]]:
    """Captions of each image id in a COCO caption file.

    Raises FileNotFoundError, or UserError where it is no such file.
    """
    content = read_json(path, EXPECTED)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{path}: no list 'annotations'; expected {EXPECTED}; {HOW_TO_GET}")
    found: dict[int | str, list[str]] = {}
    for number, annotation in enumerate(annotations):
        try:
            image_id, caption = _annotation(annotation)
        except ValueError as error:
            told = f"{path}: annotation {number} is {shown(annotation)}: {error}; expected {EXPECTED}"
            raise UserError(told) from None
        found.setdefault(image_id, []).append(caption)
    return found


def _annotation(annotation: Any) -> tuple[int | str, str]:
    if not isinstance(annotation, dict):
        raise UserError("no object")
    image_id = get_id(annotation)
    if image_id is None:
        raise UserError("no key 'image_id'")
    return image_id, get_text(annotation, "caption")


def _ids(
    file: str | Path, paths: Sequence[str], given: Sequence[int | str | None], *, running: bool
) -> list[int | str]:
    """The id of each image; see `CaptioningEvalDataset`. running: they may be running numbers."""
    named = sum(image_id is not None for image_id in given)
    if 0 < named < len(given):
        record = given.index(None)
        raise UserError(f"{file}: record {record}: no 'image_id', which other records have: give it to all or to none")
    ids: list[Any] = list(given)
    if not named:
        digits = [re.search(r"\d+$", Path(path).stem) for path in paths]
        ids = [int(found[0]) if found else None for found in digits]
    owner: dict[Any, int] = {}
    for record, image_id in enumerate(ids):
        other = owner.setdefault(image_id, record)
        if image_id is not None and other == record:
            continue
        if running and not named:
            log.info("%s: images are numbered as they stand, from 0: no 'image_id', and names without numbers", file)
            return list(range(len(paths)))
        if image_id is None:
            fault = f"{paths[record]} has no 'image_id', and no number at the end of its name, to find its captions by"
        else:
            fault = f"{paths[record]} has the same number, {image_id}, as {paths[other]} of record {other}"
        raise UserError(f"{file}: record {record}: {fault}")
    return ids


def prompted(encode: TextEncoder, prompt: str, caption: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The text fields of a caption with the prompt before it."""
    return encode(prompt + caption, rng, masked=False)


def training_set(config: CaptioningConfig, encode: TextEncoder, side: int, seed: int) -> Dataset:
    """Return the data that the configuration trains on, images of `side` pixels: the user's data, the bundled scenes,
    drawn anew in each epoch, or annotated files.
    """
    fields = partial(prompted, encode, config.prompt)
    if config.bundled:
        return BundledScenes(load_glyphs(), fields, config.bundled.train_scenes, side=side, seed=seed)
    transform = TrainTransform(side, scale=FINETUNING_SCALE)
    if config.data:
        return OwnPairs(own_captions(config)[0], partial(as_item, transform, fields), seed=seed)
    reading = {"seed": seed, "decoding": config.decoding}
    return RetrievalTrainDataset(config.train_file, config.image_root, transform, fields, **reading)


def evaluation_sets(config: CaptioningConfig, side: int, debug: bool = False) -> dict[str, Described]:
    """ "val", by which the best weights are chosen, then what they are tested on; of the user's data, those images that
    are held out. debug: a few images of each.
    """
    limit = DEBUG_IMAGES if debug else None
    if config.data:
        held = own_captions(config)[1]
        return {} if held is None else {"val": OwnImages(held, EvalTransform(side), limit)}
    if not config.bundled:
        files = {"val": (config.val_file, config.val_gt_file), "test": (config.test_file, config.test_gt_file)}
        reading = {"limit": limit, "decoding": config.decoding}
        return {
            name: CaptioningEvalDataset(file, config.image_root, EvalTransform(side), gt_file=gt_file, **reading)
            for name, (file, gt_file) in files.items()
        }
    glyphs, bundled = load_glyphs(), config.bundled
    val, test = (min(scenes, limit or scenes) for scenes in (bundled.val_scenes, bundled.test_scenes))
    tests = {split: BundledCaptions(glyphs, split, test, side=side) for split in bundled.test}
    return {"val": BundledCaptions(glyphs, "scenes", val, side=side, seed=1)} | tests
