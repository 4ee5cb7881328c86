"""Annotation files: the dataset holds what the JSON says, or one line names the file."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.regions import RegionDataset
from datasets.tasks.captioning import CaptioningEvalDataset, read_references
from datasets.tasks.retrieval import RetrievalEvalDataset, RetrievalTrainDataset
from datasets.tasks.vqa import Images, VQATrainDataset, candidates, file_questions
from tests.fuzz.damage import check, damaged_bytes, damaged_json, fuzzed, same

pytestmark = pytest.mark.script

BOX = [0, 0, 9, 9.5]
REGION = {"bb": BOX, "caption": ["a", "b"], "attributes": "red"}


def texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def boxes(value: Any) -> list[tuple]:
    value = value or []
    return [tuple(map(float, box)) for box in (value if not value or isinstance(value[0], list) else [value])]


def plain(records: Any) -> list:
    return [records[i] for i in range(len(records))]


def pairs(path: Path, root: Path) -> list:
    return [record for _, record in plain(ImageTextDataset([(path, root)], None, None, seed=0).records)]


def regions(path: Path, root: Path) -> list:
    return [record for _, record in plain(RegionDataset([(path, root)], None, 16, 8, seed=0).records)]


def told_regions(records: list[dict]) -> list:
    found = []
    for record in records:
        elems = [
            (boxes(e["bb"])[0], texts(e["caption"]), texts(e["attributes"]) if e.get("attributes") else [])
            for e in record["elems"]
        ]
        captions = texts(record["caption"]) if record.get("caption") else []
        elems = [elem for elem in elems if min(elem[0][2:]) >= 1]
        found += [(record["image"], captions, elems)] if captions or elems else []
    return found


def retrieval(path: Path, root: Path) -> list:
    data = RetrievalEvalDataset(path, root, None)
    assert [data.txt2img[t] for own in data.img2txt for t in own] == data.txt2img
    return [(image, [data.texts[t] for t in own]) for image, own in zip(data.images, data.img2txt, strict=True)]


def paired(path: Path, root: Path) -> list:
    return [record[:2] for record in plain(RetrievalTrainDataset([path], root, None, None, seed=0).records)]


def captioning(path: Path, root: Path) -> list:
    data = CaptioningEvalDataset(path, root, None)
    return [(image, list(own)) for image, own in zip(data.images, data.references, strict=True)]


def questions(path: Path, root: Path) -> list:
    return [record[1:4] for record in plain(VQATrainDataset([path], Images({"vqa": root}), None, None, seed=0).records)]


def asked(path: Path, root: Path) -> list:
    data = file_questions([path], Images({"vqa": root}), 16, None)
    return [[(text, data.asked[number].question_id) for text, number in group] for group in plain(data.groups)]


def told_asked(records: list[dict]) -> list:
    groups: dict[str, list] = {}
    for record in records:
        groups.setdefault(record["image"], []).append((record["question"], record["question_id"]))
    return list(groups.values())


def references(path: Path, root: Path) -> dict:
    return read_references(path)


def told_references(content: dict) -> dict:
    found: dict[int | str, list] = {}
    for annotation in content["annotations"]:
        number = annotation["image_id"]
        number = int(number) if str(number).isdecimal() else number
        found.setdefault(number, []).append(annotation["caption"])
    return found


class Kind(NamedTuple):
    """Content of a good file; what a dataset holds of a file; the same, as the JSON says it."""

    content: Any
    load: Callable[[Path, Path], Any]
    told: Callable[[Any], Any]


CAPTIONED = [
    {"image": f"{i}.png", "caption": ["a dog", "a cat"][: i % 2 + 1], "image_id": i, "dataset": "coco"}
    for i in range(4)
]
PAIRS = [
    {"image": "0.png", "caption": "a dog", "dataset": "cc3m"},
    {"image": "1.png", "caption": ["a", "b"], "bb": [BOX, [2, 2, 4, 4]]},
    {"image": "2.png", "caption": ["a", "b"], "bb": BOX},
]
ASKED = [
    {"image": f"{i // 2}.png", "question": "what?", "question_id": i, "dataset": "vqa", "answer": ["yes", "yes", "no"]}
    for i in range(4)
]
KINDS = {
    "pairs": Kind(PAIRS, pairs, lambda found: [(r["image"], texts(r["caption"]), boxes(r.get("bb"))) for r in found]),
    "regions": Kind(
        [
            {"image": "0.png", "caption": "a dog", "elems": [REGION]},
            {"image": "1.png", "elems": [REGION, {"bb": [0, 0, 0.5, 9], "caption": "c"}]},
        ],
        regions,
        told_regions,
    ),
    "retrieval": Kind(CAPTIONED, retrieval, lambda found: [(r["image"], texts(r["caption"])) for r in found]),
    "retrieval, training": Kind(
        CAPTIONED, paired, lambda found: [(r["image"], text) for r in found for text in texts(r["caption"])]
    ),
    "captioning": Kind(CAPTIONED, captioning, lambda found: [(r["image"], texts(r["caption"])) for r in found]),
    "captioning, references": Kind(
        {"annotations": [{"image_id": 3, "caption": "a"}, {"image_id": "4", "caption": "b"}], "images": []},
        references,
        told_references,
    ),
    "vqa": Kind(ASKED, questions, lambda found: [(r["image"], r["question"], texts(r["answer"])) for r in found]),
    "vqa, questions": Kind(ASKED, asked, told_asked),
    "vqa, answers": Kind(
        ["yes", "no", "two"],
        lambda path, root: candidates(SimpleNamespace(data=None, answer_list=path)),
        lambda found: found,
    ),
}


@pytest.fixture(scope="module")
def root(folder):
    (folder / "images").mkdir()
    for i in range(4):
        (folder / "images" / f"{i}.png").touch()
    return folder / "images"


@pytest.mark.parametrize("kind", KINDS)
def test_good_annotations(folder, root, kind):
    content, load, told = KINDS[kind]
    (folder / "good.json").write_text(json.dumps(content))
    assert same(load(folder / "good.json", root), told(content))


@pytest.mark.parametrize("kind", KINDS)
@fuzzed
@given(data=st.data())
def test_annotations(folder, root, kind, data):
    content, load, told = KINDS[kind]
    path, text = folder / "fuzzed.json", json.dumps(content).encode()
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(damaged_json(content))).encode()
    else:
        text = data.draw(damaged_bytes(text))
    path.write_bytes(text)
    check(f"annotations, {kind}", path, lambda: load(path, root), lambda found: same(found, told(json.loads(text))))
