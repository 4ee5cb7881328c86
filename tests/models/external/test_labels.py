"""Folders of images are the model's own classes: by name, by synset, by a file, else an error that lists them."""

import json
import random

import pytest
import timm
import torch
import transformers
from timm.data import ImageNetInfo

from models.external.labels import Classes, classes_of_timm, classes_of_transformers, read_map

INFO = ImageNetInfo()
DESCRIPTIONS = INFO.label_descriptions()


def config(names):
    return transformers.ViTConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})


def test_any_order_of_folders_gets_the_label_of_its_name():
    names = [f"class {i}" for i in range(30)]
    classes = classes_of_transformers(config(names))
    for seed in range(20):
        folders = random.Random(seed).sample(names, random.Random(seed).randint(1, 30))
        assert classes.labels(folders) == [names.index(folder) for folder in folders]
        spelt = [folder.replace(" ", "_").title() for folder in folders]
        assert classes.labels(spelt) == classes.labels(folders)


@pytest.mark.parametrize("unknown", [["horse"], ["cow", "horse"], [f"x{i}" for i in range(30)]])
def test_a_folder_that_is_no_class_is_listed(unknown):
    classes = classes_of_transformers(config(["dog", "cat", "zebra"]))
    with pytest.raises(ValueError, match="class folders are none of the model's 3 classes: 'cow|horse|x0'") as caught:
        classes.labels(["cat", "dog", *unknown])
    told = str(caught.value)
    assert "\n" not in told and all(repr(name) in told for name in unknown[:8]) and "--class_map" in told
    assert "the model has 3 classes: 'dog', 'cat', 'zebra'" in told


def test_never_by_position_where_the_model_has_names():
    with pytest.raises(ValueError, match="3 of 3 class folders"):
        classes_of_transformers(config(["dog", "cat", "zebra"])).labels(["1", "2", "3"])


def test_by_position_where_no_class_has_a_name_and_all_are_there(caplog):
    with caplog.at_level("INFO"):
        assert classes_of_transformers(transformers.ViTConfig(num_labels=3)).labels(["a", "b", "c"]) == [0, 1, 2]
    assert "the model has no names for its classes: the 3 folders are counted in their order" in caplog.text
    assert classes_of_transformers(transformers.ViTConfig(num_labels=3)).labels(["LABEL_2"]) == [2]
    model = timm.create_model("test_vit", num_classes=12)
    assert classes_of_timm(model).labels([str(i) for i in range(12)]) == list(range(12))
    for few in (["a", "b"], [str(i) for i in range(11)]):
        with pytest.raises(
            ValueError, match="none of the model's 12 classes: .*, which have no names; give --class_map"
        ):
            classes_of_timm(model).labels(few)


@pytest.mark.parametrize("first", [0, 1])
def test_synsets_of_imagenet(first):
    """Published classifiers have ImageNet's words as names, some with a class for the background before them."""
    names = ["background"] * first + [
        f"{d}" if DESCRIPTIONS.count(d) == 1 else f"{d} {i}" for i, d in enumerate(DESCRIPTIONS)
    ]
    for classes in (
        classes_of_transformers(config(names)),
        classes_of_transformers(transformers.ViTConfig(num_labels=1000 + first)),
        classes_of_timm(timm.create_model("test_vit", num_classes=1000)) if not first else None,
    ):
        if classes is None:
            continue
        for seed in range(5):
            chosen = random.Random(seed).sample(range(1000), 10)
            assert classes.labels([INFO.index_to_label_name(i) for i in chosen]) == [first + i for i in chosen]


def test_words_of_imagenet_that_are_no_others():
    classes = classes_of_timm(timm.create_model("test_vit", num_classes=1000))
    assert classes.labels(["tench", "Tinca_tinca", "goldfish"]) == [0, 0, 1]
    with pytest.raises(ValueError, match="1 of 2 class folders .*: 'crane'"):  # a bird, and a machine
        classes.labels(["crane", "tench"])


def test_a_thousand_other_names_are_not_imagenet():
    classes = classes_of_transformers(config([f"own {i}" for i in range(1000)]))
    with pytest.raises(ValueError, match="'n01440764'"):
        classes.labels(["n01440764"])


def test_a_file_says_which(tmp_path):
    classes = Classes(3, {"dog": 0, "cat": 1}, True)
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"chien": "dog", "chat": 1, "zebre": 2, "unused": 0}))
    given = read_map(path, classes)
    assert classes.labels(["chat", "chien", "zebre"], given) == [1, 0, 2]
    with pytest.raises(ValueError, match="--class_map has no class for 'dog'"):
        classes.labels(["dog", "chat"], given)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[0, 1]", "expected {folder: class}, got a list"),
        ("{", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"a": 3}', "3 of 'a' is none of the model's 3 classes"),
        ('{"a": -1}', "-1 of 'a'"),
        ('{"a": true}', "True of 'a'"),
        ('{"a": 1.0}', "1.0 of 'a'"),
        ('{"a": "wolf"}', "'wolf' of 'a' is none of the model's 3 classes"),
        ('{"a": [1]}', r"\[1\] of 'a'"),
        ('{"a": null}', "None of 'a'"),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_says_something_else(tmp_path, content, told):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=f"--class_map .*map.json: {told}") as caught:
        read_map(tmp_path / "map.json", Classes(3, {"dog": 0, "cat": 1}, True))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_map(tmp_path / "absent.json", Classes(3, {}, False))


def test_names_that_come_with_the_weights_of_timm():
    model = timm.create_model("test_vit", num_classes=3)
    torch.manual_seed(0)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["dog", "cat", "zebra"]}
    assert classes_of_timm(model).labels(["cat", "zebra"]) == [1, 2]
    with pytest.raises(ValueError, match="3 of 3 class folders"):
        classes_of_timm(model).labels(["a", "b", "c"])
