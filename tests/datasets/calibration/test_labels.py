"""Calibration and evaluation data of classifiers: bundled or in ImageNet's layout, as configurations name it."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from configs.pretraining import LabelsStage
from configs.pruning import LabelsEvaluation, LabelsPruneConfig
from configs.sources import LabelledImages
from datasets.bundled.curriculum import LabelledCurriculum
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.data_kinds import LabelsCalibration
from datasets.labelled.public import labelled
from datasets.place import Place
from datasets.transforms import IMAGENET, EvalTransform
from engine.reports.data_check import check_data

BUNDLED = LabelsPruneConfig("m.yaml", "random", bundled=True, batch_size=3, workers=0)
SYNSETS = ("n01", "n02")


@pytest.fixture
def imagenet(tmp_path, write_image):
    """Ten images of two classes; (configuration, number of classes)."""
    root = tmp_path / "imagenet"
    (root / "annots").mkdir(parents=True)
    (root / "annots" / "metadata.csv").write_text("folder_name,class_name\n" + "".join(f"{s},{s}\n" for s in SYNSETS))
    for i in range(10):
        write_image(root / "train" / SYNSETS[i % 2] / f"{i}.JPEG", seed=i)
    images = LabelledImages("imagenet", "train", str(root))
    return LabelsPruneConfig("m.yaml", "random", images=images, batch_size=3, workers=0)


@pytest.fixture
def read(tmp_path):
    def read(config, num_batches=4, seed=0, classes=None, **place):
        sizes = SimpleNamespace(image_size=32, classes=classes or (76 if config.bundled else 2))
        return LabelsCalibration(config, sizes, tmp_path, num_batches, seed, **place)

    return read


@pytest.fixture(params=["bundled", "imagenet"])
def config(request):
    return BUNDLED if request.param == "bundled" else request.getfixturevalue("imagenet")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key].to("cpu"), b[key].to("cpu")) for key in a)


def test_batches(read, config):
    data = read(config, num_batches=3)
    batches = list(data)
    assert len(batches) == len(data) == 3 and data.numbers == [0, 1, 2] and data.rounds == [1, 1, 1]
    for batch in batches:
        assert batch["image"].shape == (3, 3, 32, 32) and batch["label"].shape == (3,)


def test_few_batches_show_concepts_from_everywhere(read):
    labels = torch.cat([batch["fine_label"] for batch in read(BUNDLED, num_batches=8)])
    assert len(set(labels.tolist())) == 24, "no concept comes twice before all came once"
    assert labels.min() < 100 and labels.max() > 450


def test_no_more_than_there_are(read, imagenet):
    data = read(imagenet, num_batches=10)
    assert len(data) == len(list(data)) == 3


@pytest.mark.script
def test_the_seed_decides_and_workers_do_not(read, config):
    first, other = list(read(config, seed=1)), list(read(config, seed=2))
    helped = list(read(dataclasses.replace(config, workers=2), seed=1))
    assert all(map(same, first, helped)) and not any(map(same, first, other))


@pytest.mark.script
def test_ranks_share_the_batches_of_fresh_epochs(read, config):
    data = read(config, num_batches=3)
    whole = [batch for epoch in range(3) for batch in data.at(epoch)]
    assert len({int(batch["image"].double().sum() * 1e4) for batch in whole}) == 9
    for rank in range(2):
        part = read(config, num_batches=3, place=Place(rank, 2))
        for epoch in range(3):
            later = part.at(epoch)
            for number, batch in zip(later.numbers, later, strict=True):
                assert number % 2 == rank and same(batch, whole[number])
            assert sum(later.rounds) == len(later) and len(later.rounds) == 3


def test_other_classes_than_those_of_the_model_are_refused(read, config):
    with pytest.raises(ValueError, match="classes and the model 5"):
        read(config, classes=5)


def test_images_are_normalised_with_the_statistics_of_imagenet(imagenet):
    image = labelled(imagenet.images, EvalTransform(8, IMAGENET), seed=0)[0]["image"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    plain = labelled(imagenet.images, EvalTransform(8, ((0, 0, 0), (1, 1, 1))), seed=0)[0]["image"]
    torch.testing.assert_close(image * std + mean, plain)


def test_what_is_missing_is_named(tmp_path, imagenet):
    nothing = LabelsPruneConfig("m.yaml", "random")
    with pytest.raises(ValueError, match="prune.yaml: no calibration data: set bundled: true, or give images"):
        nothing.check_calibration("prune.yaml")
    with pytest.raises(ValueError, match="prune.yaml: no evaluation data"):
        nothing.check_evaluation("prune.yaml")
    imagenet.check_calibration("prune.yaml")
    no_split = dataclasses.replace(imagenet.images, split="val")
    with pytest.raises(FileNotFoundError, match="imagenet/val: image folder not found"):
        dataclasses.replace(imagenet, images=no_split).check_calibration("prune.yaml")
    evaluation = LabelsEvaluation(images=LabelledImages("flowers102", "test", str(tmp_path / "flowers")))
    with pytest.raises(FileNotFoundError, match="flowers/annots/metadata.csv: file not found"):
        dataclasses.replace(BUNDLED, evaluation=evaluation).check_evaluation("prune.yaml")


def test_weights_may_be_a_file_a_folder_or_a_repository(tmp_path):
    (tmp_path / "vit.pth").touch()
    for weights in ("random", str(tmp_path), str(tmp_path / "vit.pth"), "facebook/dino-vitb16"):
        LabelsPruneConfig("m.yaml", weights).check_weights()
    for weights in ("nowhere/vit.safetensors", "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match="weights file not found"):
            LabelsPruneConfig("m.yaml", weights).check_weights()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LabelledImages("cifar", "train"), "dataset must be one of imagenet, flowers102"),
        (lambda: LabelsEvaluation(bundled_split="train"), "bundled_split must be unseen or seen"),
        (lambda: LabelsEvaluation(bundled_images=3, images=LabelledImages("imagenet", "val")), "not both"),
        (lambda: LabelsPruneConfig("m", "random", bundled=True, images=LabelledImages("imagenet", "val")), "not both"),
        (lambda: BUNDLED.reranking(8), "--k_test"),
        (lambda: LabelsStage(steps=1, batch_size=2, strength=1.5), "strength"),
    ],
)
def test_configurations_that_cannot_be(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_check_data_lists_what_is_read(imagenet):
    config = dataclasses.replace(
        imagenet, weights="facebook/dino-vitb16", evaluation=LabelsEvaluation(bundled_images=9)
    )
    weights, bundled, images = check_data(config)
    assert weights.ok and "hub" in weights.detail
    assert bundled.source == "evaluation" and bundled.ok and "bundled images" in bundled.detail
    assert images.ok and images.detail == "10 images of 2 classes; 10 of 10 images looked up are there"
    missing = dataclasses.replace(imagenet.images, root="data/imagenet/nowhere")
    (found,) = check_data(dataclasses.replace(imagenet, images=missing))
    assert not found.ok and "metadata.csv" in found.detail


def test_a_curriculum_goes_on_at_any_step():
    stages = [LabelsStage(3, 4, 0.0), LabelsStage(2, 6)]
    config = SimpleNamespace(stages=stages, workers=0, epoch_length=10)
    data = LabelledCurriculum(config, load_glyphs(), 24, seed=5)
    whole = list(data.steps(0))
    assert [len(batch["label"]) for batch in whole] == [4, 4, 4, 6, 6] and len(data) == 5
    for start in range(6):
        later = list(data.steps(start))
        assert len(later) == 5 - start and all(map(same, later, whole[start:]))
