"""Records of annotation files: what is damaged is named by file and record when they are opened."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.loading import read_yaml
from datasets.annotations import (
    get_box,
    get_id,
    get_path,
    get_text,
    get_texts,
    parse_json,
    read_by_folder,
    read_records,
    shown,
)
from datasets.labelled.image_folder import ImageFolder
from datasets.pairs.pretraining import parse_pair
from datasets.pairs.regions import parse_regions
from datasets.pairs.tars import count_samples
from datasets.tasks.captioning import CaptioningEvalDataset, read_references
from datasets.tasks.retrieval import RetrievalTrainDataset, parse_captioned, parse_paired
from datasets.tasks.vqa import parse_question
from datasets.transforms import EvalTransform
from sparsity.errors import UserError

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {"image": "1.png", "caption": "a dog", "question": "who", "question_id": 1, "answer": ["a"] * 10, "image_id": 1}
GOOD |= {"elems": [{"bb": [0, 0, 5, 5], "caption": "a dog"}]}


def ask(record):
    return parse_question(record, answered=True, identified=True)


PARSERS = (parse_pair, parse_regions, parse_paired, parse_captioned, ask)
KEYS = st.sampled_from([*GOOD, "bb", "dataset"])
BAD = st.sampled_from(["\ud800", "a\udfff", "", " ", 10**400])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | BAD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@QUICK
@given(st.sampled_from(PARSERS), st.lists(st.tuples(KEYS, json_values), max_size=3))
@pytest.mark.script
def test_a_record_is_read_or_refused_in_one_line(tmp_path, parse, changes):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD, GOOD | dict(changes)]))
    try:
        read_records(path, parse, "a record")
        read_by_folder(path, {"coco": "x", "": "y"}, parse, "a record")
    except UserError as error:
        told = str(error)
        assert told.startswith(f"{path}: record 1") and "\n" not in told and told.isprintable() and len(told) < 600


@QUICK
@given(st.binary(max_size=60))
def test_bytes_are_json_or_refused(content):
    try:
        parse_json(content)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"caption": "a \ud83d dog"}, r"'caption' has half a character \(lone surrogate\), '\\ud83d', at 2"),
        ({"caption": ["a", "\udc00"]}, r"'caption' has half a character"),
        ({"image": "\ud800.png"}, "'image' has half a character"),
        ({"image": ""}, "'image' must not be empty"),
        ({"image": "a\0.png"}, r"'image' must be a path, got 'a\\x00.png'"),
        ({"caption": ""}, "'caption' must not be empty, got ''"),
        ({"caption": ["a", " \n"]}, r"'caption' must not be empty, got ' \\n'"),
        ({"image_id": None}, "'image_id' must be a number or a text, got None"),
        ({"image_id": [7]}, r"'image_id' must be a number or a text, got \[7\]"),
        ({"image_id": True}, "'image_id' must be a number or a text, got True"),
        ({"image_id": 7.5}, "'image_id' must be a number or a text, got 7.5"),
        ({"image_id": ""}, "'image_id' must not be empty"),
    ],
)
@pytest.mark.parametrize("parse", [parse_paired, parse_captioned])
def test_what_is_wrong_with_a_caption(write_json, tmp_path, parse, change, told):
    path = write_json(tmp_path / "a.json", [GOOD, GOOD | change])
    with pytest.raises(UserError, match=rf"a.json: record 1: {told}.*; expected a record"):
        read_records(path, parse, "a record")


@pytest.mark.parametrize(
    ("parse", "change", "told"),
    [
        (ask, {"question": " "}, "'question' must not be empty"),
        (ask, {"answer": ""}, "'answer' must not be empty"),
        (ask, {"answer": ["\ud800"] * 10}, "'answer' has half a character"),
        (ask, {"question_id": None}, "'question_id' must be a number or a text, got None"),
        (ask, {"question_id": [1]}, "'question_id' must be a number or a text"),
        (ask, {"dataset": ["vqa"]}, r"'dataset' must be 'vqa' or 'vg', got \['vqa'\]"),
        (ask, {"dataset": None}, "'dataset' must be 'vqa' or 'vg', got None"),
        (parse_pair, {"bb": False}, "a box 'bb' must be"),
        (parse_pair, {"bb": {}}, "a box 'bb' must be"),
        (parse_pair, {"bb": [True, 0, 5, 5]}, "a box 'bb' must be"),
        (parse_pair, {"bb": [10**400, 0, 5, 5]}, "a box 'bb' must be"),
        (parse_regions, {"elems": [{"bb": [0, 0, 5, 5], "caption": " "}]}, "'caption' must not be empty"),
        (
            parse_regions,
            {"attributes": "a", "elems": [{"bb": [0, 0, 5, 5], "caption": "a", "attributes": 0}]},
            "'attributes' must be",
        ),
    ],
)
def test_what_is_wrong_with_other_records(parse, change, told):
    with pytest.raises(UserError, match=told):
        parse(GOOD | change)


def test_an_annotator_may_have_said_nothing():
    assert ask(GOOD | {"answer": ["yes", ""]}).answers == ["yes", ""]


def test_what_may_be_left_out():
    assert parse_pair(GOOD | {"bb": None})[2] == parse_pair(GOOD | {"bb": []})[2] == []
    for caption in (None, "", []):
        assert parse_regions(GOOD | {"caption": caption})[1] == []


def test_a_dataset_that_is_no_text_is_not_any_other(write_json, tmp_path):
    path = write_json(tmp_path / "a.json", [GOOD, GOOD | {"dataset": None}])
    with pytest.raises(UserError, match="record 1: 'dataset' must be a text, got None"):
        read_by_folder(path, {"coco": "x", "": "y"}, parse_pair, "a record")


@pytest.mark.parametrize("depth", [700, 5_000, 200_000])
@pytest.mark.script
def test_brackets_in_brackets(tmp_path, depth):
    path = tmp_path / "a.json"
    path.write_text("[" * depth + "]" * depth)
    for read in (lambda: read_records(path, parse_pair, "a record"), lambda: read_references(path)):
        with pytest.raises(UserError, match=r"a.json: ") as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    (tmp_path / "1.png").touch()
    (tmp_path / "captions.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match=r"captions.json: expected JSON"):
        ImageFolder(tmp_path, seed=0)
    (tmp_path / "a.yaml").write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match=r"a.yaml: (not valid YAML: too many brackets in brackets|expected a mapping)"):
        read_yaml(tmp_path / "a.yaml")
    stats = tmp_path / "0_stats.json"
    stats.write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match="0_stats.json: expected img2dataset's JSON"):
        count_samples(tmp_path / "0.tar")


def test_values_are_shown_shortly():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) <= 60 and len(shown("x" * 10**6)) <= 60 and shown([1, 2, 3]) == "[1, 2, 3]"
    while deep:  # else the interpreter frees them one inside the other
        deep = deep.pop()


@pytest.mark.parametrize(("value", "found"), [(7, 7), ("007", 7), ("cat", "cat"), ("coco_7", "coco_7"), (-3, -3)])
def test_ids(value, found):
    assert get_id({"image_id": value}) == found and get_id({}) is None


@QUICK
@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(10**9), 10**9),
        min_size=4,
        max_size=4,
    )
)
def test_boxes(numbers):
    assert get_box(numbers) == tuple(map(float, numbers))


@QUICK
@given(st.text())
def test_texts(text):
    """Hypothesis draws no lone surrogates here; every other text with a word in it is kept as it is."""
    record = {"caption": text, "image": text}
    if text.strip():
        assert get_text(record, "caption") == text and get_texts(record, "caption") == [text]
        assert "\0" in text or get_path(record) == text
    else:
        with pytest.raises(UserError, match="must not be empty"):
            get_text(record, "caption")
        assert get_text(record, "caption", blank=True) == text


# Images and their ids


@pytest.fixture
def own(tmp_path, write_json):
    """Makes pictures of one's own, with records; returns the annotation file."""

    def make(names, **fields):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
        records = [
            {"image": n, "caption": ["x"], **{key: value[i] for key, value in fields.items()}}
            for i, n in enumerate(names)
        ]
        return write_json(tmp_path / "t.json", records)

    return make


def described(file, **options):
    return CaptioningEvalDataset(file, file.parent, EvalTransform(8), **options)


OWN = [("cat.png", "dog.png"), ("cat_1.png", "dog_1.png"), ("a/1.png", "b/1.png"), ("a_3.png", "b_4.png")]


@pytest.mark.parametrize("names", OWN)
def test_own_pictures_have_the_ids_of_their_records(own, names):
    assert described(own(names, image_id=[7, 8])).ids == [7, 8]
    assert described(own(names, image_id=["cat", "08"])).ids == ["cat", 8]


@pytest.mark.parametrize(("names", "ids"), [*zip(OWN, [[0, 1], [0, 1], [0, 1], [3, 4]], strict=True)])
def test_own_pictures_without_ids_are_numbered(own, names, ids):
    assert described(own(names)).ids == ids


def test_references_are_found_by_the_ids_of_the_records(own, write_json, tmp_path):
    captions = [{"image_id": 2, "caption": "a cat"}, {"image_id": 1, "caption": "a dog"}]
    gt = write_json(tmp_path / "gt.json", {"annotations": captions})
    file = own(("x_1.png", "x_2.png"), image_id=[2, 1])
    assert described(file, gt_file=gt).references == [["a cat"], ["a dog"]]
    with pytest.raises(UserError, match="record 0: cat.png has no 'image_id', and no number at the end of its name"):
        described(own(("cat.png", "dog_1.png")), gt_file=gt)
    with pytest.raises(UserError, match=r"record 1: b/1.png has the same number, 1, as a/1.png of record 0"):
        described(own(("a/1.png", "b/1.png")), gt_file=gt)


def test_ids_must_tell_images_apart(own, write_json, tmp_path):
    with pytest.raises(UserError, match=r"t.json: record 1: dog.png has the same number, 7, as cat.png of record 0"):
        described(own(("cat.png", "dog.png"), image_id=[7, "7"]))
    file = own(("cat.png", "dog.png"))
    records = json.loads(file.read_text())
    records[0]["image_id"] = 7
    write_json(file, records)
    with pytest.raises(UserError, match="record 1: no 'image_id', which other records have"):
        described(file)


@pytest.mark.parametrize("caption", ["", " ", "\ud800", None, 3])
def test_a_reference_that_is_none(write_json, tmp_path, caption):
    write_json(
        tmp_path / "gt.json", {"annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": caption}]}
    )
    with pytest.raises(UserError, match=r"gt.json: annotation 1 is .*'caption'.*"):
        read_references(tmp_path / "gt.json")


def test_images_without_an_id_are_not_one(own):
    """ "None" was the id of all of them, so that every caption matched every image."""
    file = own(("cat.png", "dog.png"))
    data = RetrievalTrainDataset([file], file.parent, lambda image, rng: 0, lambda text, rng: {}, seed=0)
    assert {int(data[i]["sample_ids"]) for i in range(2)} == {0, 1}
    with pytest.raises(UserError, match="record 0: 'image_id' must be a number or a text, got None"):
        RetrievalTrainDataset([own(("cat.png",), image_id=[None])], file.parent, lambda *_: 0, lambda *_: {}, seed=0)
