"""Visual question answering: questions with weighted answers to train on, and questions about each image to answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from configs.decoding import Decoding
from configs.finetuning import VQAConfig
from configs.task import DEBUG_IMAGES
from datasets.annotations import (
    HOW_TO_GET,
    ImageRoot,
    Records,
    check_text,
    get_id,
    get_path,
    get_text,
    get_texts,
    read_json,
    read_records,
    shown,
)
from datasets.bundled.glyphs import image_tensor, load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.bundled.vqa import BundledQuestions, answer_list, questions_about
from datasets.collate import Skipped, collate
from datasets.images import DEFAULT
from datasets.own.questions import OwnQuestions, own_questions
from datasets.sampler import sample_generator
from datasets.text import Tokenizer, clean_question, mentions_side
from datasets.transforms import FINETUNING_SCALE, EvalTransform, TrainTransform
from datasets.vqa_accuracy import Asked
from sparsity.errors import UserError

EXPECTED = '{"image": path, "question": text, "answer": text or [text], "dataset": "vqa" or "vg"}'
EXPECTED_TEST = '{"image": path, "question": text, "question_id": number, "dataset": "vqa" or "vg"}'
EXPECTED_VAL = EXPECTED_TEST.replace('"dataset"', '"answer": [text], "dataset"')
EXPECTED_ANSWERS = "texts, the answers that there are to choose from"
SOURCES = {"vqa": "vqa_root", "vg": "vg_root"}  # the "dataset" of a record -> the setting with its image folder
OWN = "vqa"  # the source of a user's own questions: their answers are weighted so
VG_WEIGHT = 0.5  # of an answer in Visual Genome


class Words:
    """Questions and answers as token ids (1-D int64), in the templates of a model.

    add_sep: `[CLS] question [SEP]` instead of `[CLS] question`. answer_ends: how many [SEP] end an answer. max_tokens:
    what is longer is cut.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, *, add_sep: bool, answer_ends: int):
        if max_tokens < 2 + answer_ends:
            raise UserError(f"max_tokens must be at least {2 + answer_ends}, got {max_tokens!r}")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.question_ends, self.answer_ends = int(add_sep), answer_ends

    def question(self, text: str) -> torch.Tensor:
        return self._ids(clean_question(text, self.max_tokens), self.question_ends)

    def answer(self, text: str) -> torch.Tensor:
        return self._ids(text, self.answer_ends)

    def _ids(self, text: str, ends: int) -> torch.Tensor:
        ids = self.tokenizer.encode(text)[: self.max_tokens - 1 - ends]
        return torch.tensor([self.tokenizer.cls_id, *ids, *[self.tokenizer.sep_id] * ends])

    def padded(self, name: str, ids: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`<name>_ids` and `<name>_atts` (n, longest)."""
        atts = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {
            f"{name}_ids": pad_sequence(list(ids), batch_first=True, padding_value=self.tokenizer.pad_id),
            f"{name}_atts": atts,
        }

    def gather_training(self, items: Sequence[Mapping[str, Any] | Skipped]) -> dict[str, Any]:
        """Items of training to a batch: `image`, `text_ids`, `text_atts` of the questions, `answer_ids`,
        `answer_atts`, `answer_weights` of all their answers, and `answer_owner`, the row of its question.
        """
        read = [item for item in items if not isinstance(item, Skipped)]
        batch = collate([item if isinstance(item, Skipped) else {"image": item["image"]} for item in items])
        if not read:
            return batch
        counts = torch.tensor([len(item["answers"]) for item in read])
        return batch | {
            **self.padded("text", [item["question"] for item in read]),
            **self.padded("answer", [ids for item in read for ids in item["answers"]]),
            "answer_weights": torch.tensor([weight for item in read for weight in item["weights"]]),
            "answer_owner": torch.arange(len(read)).repeat_interleave(counts),
        }

    def gather_asked(self, items: Sequence[Mapping[str, Any] | Skipped]) -> dict[str, Any]:
        """Items of `Questions` to a batch: `image`, `text_ids`, `text_atts` of all their questions, the row `image_of`
        each, and its `number`.
        """
        read = [item for item in items if not isinstance(item, Skipped)]
        batch = collate([item if isinstance(item, Skipped) else {"image": item["image"]} for item in items])
        if not read:
            return batch
        counts = torch.tensor([len(item["questions"]) for item in read])
        return batch | {
            **self.padded("text", [ids for item in read for ids in item["questions"]]),
            "image_of": torch.arange(len(read)).repeat_interleave(counts),
            "number": torch.tensor([number for item in read for number in item["numbers"]]),
        }


class Record(NamedTuple):
    """A question of an annotation file. source: one of `SOURCES`."""

    source: str
    image: str
    question: str
    answers: list[str]
    question_id: int | str | None

    def weights(self) -> dict[str, float]:
        """Answer -> its weight: the share of the annotators who gave it."""
        if self.source == "vg":
            return dict.fromkeys(self.answers, VG_WEIGHT)
        return {answer: self.answers.count(answer) / len(self.answers) for answer in dict.fromkeys(self.answers)}


def parse_question(record: dict, answered: bool, identified: bool) -> Record:
    """Raise UserError where something is missing: answers where it must be `answered`, `question_id` where it must be
    `identified`.
    """
    source = record.get("dataset", "vqa")
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"'dataset' must be {' or '.join(map(repr, SOURCES))}, got {shown(source)}")
    image, number = get_path(record), get_id(record, "question_id") if identified else None
    if identified and number is None:
        raise UserError("no key 'question_id'")
    # An annotator may have said nothing; who gives one answer alone has given one.
    several = isinstance(record.get("answer"), list)
    answers = get_texts(record, "answer", blank=several) if answered or "answer" in record else []
    image = Path(image).name if source == "vg" else image  # images of Visual Genome lie in one folder
    return Record(source, image, get_text(record, "question"), answers, number)


class Images:
    """The image folders of the sources.

    roots: source -> folder, or None where it is not set. decoding: how image files become pictures.
    """

    def __init__(self, roots: Mapping[str, str | None], decoding: Decoding = DEFAULT):
        self.roots = {source: ImageRoot(folder, decoding) for source, folder in roots.items() if folder}

    def check(self, file: str | Path, records: Sequence[Record]) -> None:
        """Raise UserError or FileNotFoundError where images of a file cannot be there."""
        for source, setting in SOURCES.items():
            paths = [record.image for record in records if record.source == source]
            if paths and source not in self.roots:
                raise UserError(f"{file}: has questions of the dataset {source!r}: set {setting}, their image folder")
            if paths:
                self.roots[source].check(file, paths)

    def load(self, source: str, path: str) -> Image.Image | Skipped:
        return self.roots[source].load(path)


class VQATrainDataset(Dataset):
    """The questions of annotation files such as `vqa_train.json` and `vg_qa.json`, with all their answers.

    It is indexed by a running number n = epoch * len(dataset) + index. An item is {"image": (3, H, W), "question": ids,
    "answers": [ids], "weights": [float]}, or `Skipped` where the image cannot be read. Batches:
    `Words.gather_training`. Half of the images are mirrored, unless question or answers speak of left or right.

    Args:
        files: the annotation files.
        images: where the images are.
        transform: (RGB image, generator) -> tensor; it does not mirror.
        seed: of all that is drawn.

    Raises:
        FileNotFoundError: a file is missing, or none of the images looked up is there.
        UserError: an annotation file is not as expected.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        images: Images,
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        words: Words,
        *,
        seed: int,
    ):
        self.records = Records(map(tuple, read_answered(files, images)))
        self.images, self.transform, self.words, self.seed = images, transform, words, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> dict[str, Any] | Skipped:
        index, rng = sample_generator(n, len(self), self.seed)
        record = Record(*self.records[index])
        image = self.images.load(record.source, record.image)
        if isinstance(image, Skipped):
            return image
        if not any(map(mentions_side, (record.question, *record.answers))) and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        weights = record.weights()
        return {
            "image": self.transform(image, rng),
            "question": self.words.question(record.question),
            "answers": [self.words.answer(answer) for answer in weights],
            "weights": list(weights.values()),
        }


class OwnVQA(VQATrainDataset):
    """The same of a user's own questions."""

    def __init__(
        self,
        data: OwnQuestions,
        transform: Callable[[Image.Image, np.random.Generator], torch.Tensor],
        words: Words,
        *,
        seed: int,
    ):
        self.records = Records(map(tuple, _own_records(data)))
        self.images, self.transform, self.words, self.seed = _own_images(data), transform, words, seed


def read_answered(files: Sequence[str | Path], images: Images) -> list[Record]:
    """Read the questions of annotation files, which must have answers; errors as `VQATrainDataset`."""
    records: list[Record] = []
    for file in files:
        found = read_records(file, partial(parse_question, answered=True, identified=False), EXPECTED)
        images.check(file, found)
        records += found
    return records


def _own_records(data: OwnQuestions) -> list[Record]:
    return [Record(OWN, own.image, own.question, own.answers, own.number) for own in data.records]


def _own_images(data: OwnQuestions) -> Images:
    return Images({OWN: str(data.images.root)}, data.images.decoding)


class Questions(Dataset):
    """Questions that are to be answered, an item for each image: {"image": (3, H, W), "questions": [ids], "numbers": of
    these questions}, or `Skipped` where it cannot be read. Batches: `Words.gather_asked`.

    asked: the questions, in order of their numbers. groups: for each image the texts of its questions and their
    numbers. load: number of an image -> (3, H, W) or `Skipped`.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        groups: Sequence[Sequence[tuple[str, int]]],
        load: Callable[[int], torch.Tensor | Skipped],
        words: Words,
    ):
        self.asked, self.groups, self.load, self.words = asked, Records(groups), load, words

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> dict[str, Any] | Skipped:
        image, group = self.load(i), self.groups[i]
        if isinstance(image, Skipped):
            return image
        questions = [self.words.question(text) for text, _ in group]
        return {"image": image, "questions": questions, "numbers": [number for _, number in group]}


def file_questions(
    files: Sequence[str | Path],
    images: Images,
    side: int,
    words: Words,
    limit: int | None = None,
    answered: bool = False,
) -> Questions:
    """The questions of annotation files such as `vqa_test.json`, about images of `side` pixels; of the first `limit`
    images. answered: their answers must be known. Errors as `VQATrainDataset`.
    """
    parse = partial(parse_question, answered=answered, identified=True)
    records: list[Record] = []
    for file in files:
        found = read_records(file, parse, EXPECTED_VAL if answered else EXPECTED_TEST)
        images.check(file, found)
        records += found
    return _about_images(records, images, side, words, limit)


def _about_images(
    records: Sequence[Record], images: Images, side: int, words: Words, limit: int | None = None
) -> Questions:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.source, record.image), []).append(record)
    paths = list(groups)[:limit]
    asked = [[(r.question, Asked(r.question_id, tuple(r.answers))) for r in groups[path]] for path in paths]
    return _numbered(asked, partial(_read, images, paths, EvalTransform(side)), words)


def _read(
    images: Images, paths: Sequence[tuple[str, str]], transform: Callable[[Image.Image], torch.Tensor], i: int
) -> torch.Tensor | Skipped:
    image = images.load(*paths[i])
    return image if isinstance(image, Skipped) else transform(image)


def bundled_questions(split: str, scenes: int, side: int, words: Words, seed: int) -> Questions:
    """All that can be asked about scenes of `datasets.bundled.scenes.BundledRetrieval`."""
    glyphs = load_glyphs()
    drawn = BundledRetrieval(glyphs, split, scenes, side=side, seed=seed)
    asked = []
    for i in range(len(drawn)):
        found = enumerate(questions_about(drawn.scene(i).objects, side, glyphs))
        asked.append([(q.text, Asked(f"{i}_{n}", (q.answer,), q.kind)) for n, q in found])
    return _numbered(asked, partial(_draw, drawn), words)


def _draw(scenes: BundledRetrieval, i: int) -> torch.Tensor:
    return image_tensor(scenes.scene(i).image)


def _numbered(
    groups: Sequence[Sequence[tuple[str, Asked]]], load: Callable[[int], torch.Tensor | Skipped], words: Words
) -> Questions:
    """Numbered image by image."""
    asked = [question for group in groups for _, question in group]
    numbers = iter(range(len(asked)))
    return Questions(asked, [[(text, next(numbers)) for text, _ in group] for group in groups], load, words)


def training_set(config: VQAConfig, words: Words, side: int, seed: int) -> Dataset:
    """Return the data that the configuration trains on, images of `side` pixels."""
    if config.bundled:
        return BundledQuestions(load_glyphs(), words, config.bundled.train_questions, side=side, seed=seed)
    transform = TrainTransform(side, scale=FINETUNING_SCALE, flip=False)
    if config.data:
        return OwnVQA(own_questions(config)[0], transform, words, seed=seed)
    return VQATrainDataset(config.train_file, _images(config), transform, words, seed=seed)


def evaluation_sets(config: VQAConfig, words: Words, side: int, debug: bool = False) -> dict[str, Questions]:
    """ "val", where there is one, by which the best weights are chosen, then what they are tested on; of the user's
    questions, those about images that are held out.
    """
    limit = DEBUG_IMAGES if debug else None
    if config.data:
        held = own_questions(config)[1]
        return {"val": _about_images(_own_records(held), _own_images(held), side, words, limit)} if held else {}
    if config.bundled is None:
        files = {"val": config.val_file, "test": config.test_file}
        images = _images(config)
        # The accuracy on "val" chooses the best weights.
        return {
            name: file_questions(of, images, side, words, limit, answered=name == "val")
            for name, of in files.items()
            if of
        }
    scenes = min(config.bundled.test_scenes, limit or config.bundled.test_scenes)
    tests = {split: bundled_questions(split, scenes, side, words, seed=0) for split in config.bundled.test}
    scenes = min(config.bundled.val_scenes, limit or config.bundled.val_scenes)
    return {"val": bundled_questions("scenes", scenes, side, words, seed=1)} | tests


def candidates(config: VQAConfig) -> list[str]:
    """The answers that there are to choose from; UserError where their file is not as expected."""
    if config.data:  # the same for all seeds, as the images that are held out
        return list(
            dict.fromkeys(said for own in own_questions(config)[0].records for said in own.answers if said.strip())
        )
    if config.answer_list is None:
        return answer_list(load_glyphs())
    expected = f"a JSON list of {EXPECTED_ANSWERS}"
    answers = read_json(config.answer_list, expected)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{config.answer_list}: expected {expected}, got {shown(answers)}; {HOW_TO_GET}")
    for i, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise UserError(f"{config.answer_list}: answer {i} is {shown(answer)}; expected {expected}; {HOW_TO_GET}")
        try:
            check_text(answer, "answer")
        except UserError as error:
            raise UserError(f"{config.answer_list}: answer {i}: {error}; {HOW_TO_GET}") from None
    return answers


def _images(config: VQAConfig) -> Images:
    return Images({source: getattr(config, setting) for source, setting in SOURCES.items()}, config.decoding)
