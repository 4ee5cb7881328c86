import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from datasets.collate import Skipped, collate
from datasets.labelled.public import flowers102, imagenet
from datasets.sampler import ResumableSampler
from datasets.transforms import EvalTransform, TrainTransform, to_tensor

SYNSETS = {"n03": "dog, hound", "n01": "cat", "n02": "apple"}


@pytest.fixture
def imagenet_root(tmp_path, write_image):
    (tmp_path / "annots").mkdir()
    rows = "".join(f'{synset},"{name}"\n' for synset, name in SYNSETS.items())
    (tmp_path / "annots" / "metadata.csv").write_text(f"folder_name,class_name\n{rows}")
    for split, synsets in (("train", SYNSETS), ("val", ("n03", "n02"))):
        for i, synset in enumerate(synsets):
            for k in range(2):
                write_image(tmp_path / split / synset / f"{k}.JPEG", seed=2 * i + k)
        (tmp_path / split / "n02" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def flowers_root(tmp_path, write_image):
    (tmp_path / "annots").mkdir()
    (tmp_path / "annots" / "metadata.csv").write_text("idx,class_name\n10,rose\n2,tulip\n0,daisy\n")
    rows = [("a", 10, "train"), ("b", 2, "val"), ("c", "daisy", "test"), ("d", 0, "train")]
    lines = "".join(f"{name}.png,{kind},{split}\n" for name, kind, split in rows)
    (tmp_path / "annots" / "split.csv").write_text(f"filename,class,split\n{lines}")
    for i, (name, _, _) in enumerate(rows):
        write_image(tmp_path / "images" / f"{name}.png", seed=i)
    return tmp_path


def test_labels_are_those_of_image_folder(imagenet_root):
    data = imagenet("train", EvalTransform(8), seed=0, root=imagenet_root)
    other = ImageFolder(imagenet_root / "train")
    assert [(str(data.root.find(path)), label) for path, label in (data.records[i] for i in range(len(data)))] == [
        (path, label) for path, label in other.samples if not path.endswith(".txt")
    ]
    assert data.class_names == ("cat", "apple", "dog, hound")
    for i in range(len(data)):
        expected, label = other[i]
        assert data[i]["label"] == label == data.labels[i]
        assert torch.equal(data[i]["image"], EvalTransform(8)(expected))


def test_a_split_without_some_classes_keeps_the_labels(imagenet_root, caplog):
    with caplog.at_level("INFO"):
        data = imagenet("val", EvalTransform(8), seed=0, root=imagenet_root)
    assert data.labels.tolist() == [1, 1, 2, 2] and len(data.class_names) == 3
    assert "no image of 1 of 3 classes" in caplog.text


def test_flowers_train_on_train_and_val(flowers_root, write_image):
    train, test = (flowers102(split, lambda image, rng: to_tensor(image), seed=0, root=flowers_root)
                   for split in ("train", "test"))  # fmt: skip
    assert train.class_names == test.class_names == ("daisy", "tulip", "rose")
    assert [item["label"].item() for item in map(train.__getitem__, range(3))] == [2, 1, 0]
    assert test.labels.tolist() == [0] and len(test) == 1
    pixels = write_image(flowers_root / "again.png", seed=1)
    assert torch.allclose(train[1]["image"], to_tensor(Image.fromarray(pixels)))


def test_what_is_drawn_depends_on_the_running_number_alone(imagenet_root):
    data = imagenet("train", TrainTransform(8), seed=5, root=imagenet_root)
    assert torch.equal(data[7]["image"], data[7]["image"])
    assert not torch.equal(data[1]["image"], data[1 + len(data)]["image"])
    other = imagenet("train", TrainTransform(8), seed=6, root=imagenet_root)
    assert not torch.equal(data[1]["image"], other[1]["image"])
    sampler = ResumableSampler(len(data), seed=0, batch_size=4, stop=3)
    alone, helped = ([*DataLoader(data, 4, sampler=sampler, collate_fn=collate, num_workers=n)] for n in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["image"], b["image"].to("cpu")) and torch.equal(a["label"], b["label"])
        assert a["label"].dtype == torch.int64 and a["image"].shape == (4, 3, 8, 8)


def test_unreadable_images_are_skipped(imagenet_root):
    path = imagenet_root / "train" / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    data = imagenet("train", EvalTransform(8), seed=0, root=imagenet_root)
    items = [data[i] for i in range(len(data))]
    assert [item.path for item in items if isinstance(item, Skipped)] == [str(path)]
    assert np.sum([isinstance(item, dict) for item in items]) == 5


def rewrite(name, content):
    def change(root):
        path = root / "annots" / name
        path.unlink() if content is None else path.write_text(content, encoding="latin-1")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            rewrite("metadata.csv", None),
            "metadata.csv: file not found; expected .* folder_name,class_name; docs/datasets",
        ),
        (rewrite("metadata.csv", "folder_name,name\nn01,a\n"), "metadata.csv: no column 'class_name'"),
        (rewrite("metadata.csv", "folder_name,class_name\n"), "metadata.csv: no row"),
        (rewrite("metadata.csv", ""), "metadata.csv: no column 'folder_name'"),
        (rewrite("metadata.csv", "folder_name,class_name\nn01,a\nn02\n"), "row 2: a column of .'n02', ''. is empty"),
        (rewrite("metadata.csv", "folder_name,class_name\nn01,a\nn01,b\n"), "row 2: folder_name 'n01' is there twice"),
        (rewrite("metadata.csv", "folder_name,class_name\nn01,\xe9\n"), "not a CSV file"),
        (rewrite("metadata.csv", "folder_name,class_name\nn01,a\nn02,b\n"), "n03: this folder is no class of"),
        (lambda root: (root / "train").rename(root / "elsewhere"), "train: image folder not found"),
        (lambda root: [path.unlink() for path in root.glob("train/*/*.JPEG")], "train: no image found"),
    ],
)
def test_imagenet_that_is_not_as_expected(imagenet_root, change, message):
    change(imagenet_root)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        imagenet("train", EvalTransform(8), seed=0, root=imagenet_root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrite("split.csv", None), "split.csv: file not found"),
        (rewrite("split.csv", "filename,class,split\na.png,7,train\n"), "a.png has the class '7', which is not in"),
        (rewrite("split.csv", "filename,class,split\na.png,2,tests\n"), "a.png has the split 'tests'"),
        (rewrite("split.csv", "filename,class,split\na.png,2,test\n"), "no image of the split 'train'"),
        (rewrite("split.csv", "filename,class,split\nz.png,2,train\n"), "none of 1 images of .*split.csv is in this"),
        (rewrite("metadata.csv", "idx,class_name\none,rose\n"), "idx must be a whole number, got 'one'"),
        (lambda root: (root / "images").rename(root / "elsewhere"), "images: image folder not found"),
    ],
)
def test_flowers_that_are_not_as_expected(flowers_root, change, message):
    change(flowers_root)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        flowers102("train", EvalTransform(8), seed=0, root=flowers_root)
    assert "\n" not in str(error.value)


def test_flowers_have_two_splits(flowers_root):
    with pytest.raises(ValueError, match="must be one of train, test, got 'val'"):
        flowers102("val", EvalTransform(8), seed=0, root=flowers_root)
