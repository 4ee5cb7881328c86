"""Captioning: what is trained on, and the images to describe with the captions that people gave them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.finetuning import CaptioningConfig
from configs.task import DEBUG_IMAGES
from datasets.annotations import HOW_TO_GET
from datasets.bundled.captions import varied_caption
from datasets.bundled.glyphs import image_tensor, load_glyphs
from datasets.bundled.scenes import BundledRetrieval, BundledScenes
from datasets.collate import Skipped
from datasets.sampler import sample_generator
from datasets.tasks.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from datasets.text import TextEncoder
from datasets.transforms import FINETUNING_SCALE, EvalTransform, TrainTransform
from sparsity.errors import MissingFileError, UserError

EXPECTED = '{"annotations": [{"image_id": number, "caption": text}]}'
REFERENCES = 5  # captions of a bundled scene, as many as COCO has of an image


class Described(Protocol):
    """Images to describe: item i is {"image": (3, H, W), "index": i}, or `Skipped` where it cannot be read.

    Attributes:
        ids: number of each image.
        references: the captions that each image has, in the same order.
    """

    ids: Sequence[int]
    references: Sequence[Sequence[str]]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, torch.Tensor] | Skipped: ...


class CaptioningEvalDataset(RetrievalEvalDataset):
    """The images of an annotation file such as `coco_karpathy_test.json`; see `Described`.

    Their ids are COCO's: the digits at the end of the file name.

    Args:
        gt_file: COCO caption file with the references; those of the annotation file where None.
        options: `annotation_file`, `image_root`, `transform` and `limit`, of `RetrievalEvalDataset`.

    Raises:
        FileNotFoundError: a file or the folder is missing, or none of the images looked up is in the folder.
        UserError: a file is not as expected, or an image has no number or no reference.
    """

    def __init__(self, annotation_file: str | Path, *options: Any, gt_file: str | Path | None = None, **named: Any):
        super().__init__(annotation_file, *options, **named)
        self.ids = [_image_id(annotation_file, path) for path in self.images]
        if len(set(self.ids)) < len(self.ids):
            twice = next(i for i in self.ids if self.ids.count(i) > 1)
            raise UserError(f"{annotation_file}: two images have the number {twice} at the end of their names")
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


def read_references(path: str | Path) -> dict[int, list[str]]:
    """Captions of each image id in a COCO caption file.

    Raises FileNotFoundError, or UserError where it is no such file.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"{path}: annotation file not found; expected {EXPECTED}; {HOW_TO_GET}")
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise UserError(f"{path}: not a JSON file ({error}); expected {EXPECTED}; {HOW_TO_GET}") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{path}: no list 'annotations'; expected {EXPECTED}; {HOW_TO_GET}")
    found: dict[int, list[str]] = {}
    for number, annotation in enumerate(annotations):
        image_id, caption = _annotation(annotation)
        if image_id is None or caption is None:
            raise UserError(f"{path}: annotation {number} is {annotation!r:.60}; expected {EXPECTED}")
        found.setdefault(image_id, []).append(caption)
    return found


def _annotation(annotation: Any) -> tuple[int | None, str | None]:
    fields: Mapping[str, Any] = annotation if isinstance(annotation, dict) else {}
    image_id, caption = fields.get("image_id"), fields.get("caption")
    number = str(image_id)
    return int(number) if number.isdecimal() else None, caption if isinstance(caption, str) else None


def _image_id(annotation_file: str | Path, path: str) -> int:
    digits = re.search(r"\d+$", Path(path).stem)
    if digits is None:
        raise UserError(f"{annotation_file}: no number at the end of {path}, which says which image of COCO it is")
    return int(digits[0])


def prompted(encode: TextEncoder, prompt: str, caption: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """The text fields of a caption with the prompt before it."""
    return encode(prompt + caption, rng, masked=False)


def training_set(config: CaptioningConfig, encode: TextEncoder, side: int, seed: int) -> Dataset:
    """What the configuration trains on, images of `side` pixels: the bundled scenes, drawn anew in each epoch, or
    annotated files.
    """
    fields = partial(prompted, encode, config.prompt)
    if config.bundled:
        return BundledScenes(load_glyphs(), fields, config.bundled.train_scenes, side=side, seed=seed)
    transform = TrainTransform(side, scale=FINETUNING_SCALE)
    return RetrievalTrainDataset(config.train_file, config.image_root, transform, fields, seed=seed)


def evaluation_sets(config: CaptioningConfig, side: int, debug: bool = False) -> dict[str, Described]:
    """ "val", by which the best weights are chosen, then what they are tested on. debug: a few images of each."""
    limit = DEBUG_IMAGES if debug else None
    if not config.bundled:
        files = {"val": (config.val_file, config.val_gt_file), "test": (config.test_file, config.test_gt_file)}
        return {
            name: CaptioningEvalDataset(file, config.image_root, EvalTransform(side), limit, gt_file=gt_file)
            for name, (file, gt_file) in files.items()
        }
    glyphs, bundled = load_glyphs(), config.bundled
    val, test = (min(scenes, limit or scenes) for scenes in (bundled.val_scenes, bundled.test_scenes))
    tests = {split: BundledCaptions(glyphs, split, test, side=side) for split in bundled.test}
    return {"val": BundledCaptions(glyphs, "scenes", val, side=side, seed=1)} | tests
