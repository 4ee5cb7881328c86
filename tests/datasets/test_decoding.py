"""Every way to read images decodes them as its configuration says: a picture that cannot be seen is black or white."""

import io
import json
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from configs.decoding import Decoding
from configs.finetuning import (
    CaptioningConfig,
    CaptioningPretrainConfig,
    ClassificationConfig,
    RetrievalConfig,
    VQAConfig,
)
from configs.pruning import Evaluation, ExternalPruneConfig, LabelsPruneConfig, PruneConfig
from configs.sources import Files, LabelledImages
from datasets.calibration.any_model import FolderBatches
from datasets.calibration.data_kinds import Calibration, LabelsCalibration
from datasets.labelled.data_path import open_data
from datasets.tasks import captioning, captioning_pretraining, image_classification, retrieval, vqa
from datasets.transforms import to_tensor
from engine.evaluation.retrieval import ZeroShot
from sparsity.errors import UserError

SIDE, NUMBER = 16, 3
SIZES = SimpleNamespace(image_size=SIDE, patch_size=8, classes=1)
COMMON = {"model_config": "m.yaml", "weights": "random", "optimizer": None, "scheduler": None}
COMMON |= {"batch_size_train": 1, "batch_size_target": 1}


@pytest.fixture
def root(tmp_path):
    """Images without a visible pixel: in folders, with records of every kind, and in a shard."""
    image = Image.new("RGBA", (SIDE, SIDE))
    for folder in ("images", "data/train/n0", "data/val/n0"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(NUMBER):
            image.save(tmp_path / folder / f"{i}.png")
    (tmp_path / "data/annots").mkdir()
    (tmp_path / "data/annots/metadata.csv").write_text("folder_name,class_name\nn0,dog\n")
    elems = [{"bb": [0, 0, SIDE, SIDE], "caption": "a dog"}]
    asked = {"question": "what", "answer": ["a dog"], "dataset": "vqa"}
    records = [
        {"image": f"{i}.png", "caption": ["a dog"], "image_id": i, "question_id": i, "elems": elems, **asked}
        for i in range(NUMBER)
    ]
    (tmp_path / "r.json").write_text(json.dumps(records))
    for record in records:
        del record["dataset"]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    (tmp_path / "answers.json").write_text('["a dog"]')
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(NUMBER):
            for kind, content in (("png", buffer.getvalue()), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{i:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return tmp_path


class Kept:
    def check(self, captioned):
        pass

    def labels(self, names):
        return None

    def __call__(self, images, captions, labels):
        return torch.stack([to_tensor(image) for image in images])


def calibrated(root, text, decoding, **sources):
    config = PruneConfig("m.yaml", "random", batch_size=1, workers=0, decoding=decoding, **sources)
    return [batch["image"] for batch in Calibration(config, text, SIZES, root / "out", num_batches=2, seed=0)]


def pairs(root, text, decoding):
    return calibrated(root, text, decoding, general=[Files(str(root / "pairs.json"), str(root / "images"))])


def shards(root, text, decoding):
    return calibrated(root, text, decoding, general=[Files("", str(root / "00000.tar"))])


def regions(root, text, decoding):
    return calibrated(root, text, decoding, region=[Files(str(root / "pairs.json"), str(root / "images"))])


def labels(root, text, decoding):
    images = LabelledImages("imagenet", "train", str(root / "data"))
    config = LabelsPruneConfig("m.yaml", "random", images=images, batch_size=1, workers=0, decoding=decoding)
    return [batch["image"] for batch in LabelsCalibration(config, SIZES, root / "out", 2, 0)]


def any_model(root, text, decoding):
    config = ExternalPruneConfig(calibration=str(root / "images"), batch_size=1, decoding=decoding)
    return list(FolderBatches(config, Kept(), root / "out", 2, 0))


def folders(root, text, decoding):
    data = open_data(str(root / "data"), False, to_tensor, side=SIDE, decoding=decoding)
    return [data[0]["image"]]


def captioned(root, kind, decoding):
    file = str(root / "pairs.json")
    files = {"train_file": [file], "val_file": file, "test_file": file, "image_root": str(root / "images")}
    return kind(**COMMON, **files, decoding=decoding)


def finetuned(root, text, decoding):
    return [retrieval.training_set(captioned(root, RetrievalConfig, decoding), text, SIDE, 0)[0]["image"]]


def described(root, text, decoding):
    config = captioned(root, CaptioningConfig, decoding)
    sets = [captioning.training_set(config, text, SIDE, 0), *captioning.evaluation_sets(config, SIDE).values()]
    return [data[0]["image"] for data in sets]


def pretrained(root, text, decoding):
    files = [Files(str(root / "pairs.json"), str(root / "images")), Files("", str(root / "00000.tar"))]
    data = captioning_pretraining.training_set(
        CaptioningPretrainConfig(**COMMON, train=files, decoding=decoding), text, SIDE, 0
    )
    index, sample = next(data.shards.read(0, 0))
    return [data.indexed[0]["image"], data.shards.item(0, index, sample)["image"]]


def asked(root, text, decoding):
    files = {
        "train_file": [str(root / "r.json")],
        "val_file": [str(root / "r.json")],
        "test_file": [str(root / "r.json")],
    }
    config = VQAConfig(
        **COMMON, **files, answer_list=str(root / "answers.json"), vqa_root=str(root / "images"), decoding=decoding
    )
    words = vqa.Words(text.tokenizer, 8, add_sep=False, answer_ends=1)
    sets = [vqa.training_set(config, words, SIDE, 0), *vqa.evaluation_sets(config, words, SIDE).values()]
    return [data[0]["image"] for data in sets]


def classified(root, text, decoding):
    config = ClassificationConfig(**COMMON, dataset="imagenet", data_root=str(root / "data"), decoding=decoding)
    sets = [
        image_classification.training_set(config, SIDE, 0),
        *image_classification.evaluation_sets(config, SIDE).values(),
    ]
    return [data[0]["image"] for data in sets]


def zero_shot(root, text, decoding):
    files = Files(str(root / "pairs.json"), str(root / "images"))
    fabric = SimpleNamespace(global_rank=0, world_size=1)
    measured = ZeroShot(None, Evaluation(files=files), text, fabric, SIZES, root / "out", decoding=decoding)
    return [measured.items[0]["image"]]


CALIBRATION = [pairs, shards, regions, labels, any_model, folders]
WAYS = [*CALIBRATION, finetuned, described, pretrained, asked, classified, zero_shot]


@pytest.mark.parametrize("way", WAYS)
def test_transparency_is_as_the_configuration_says(root, text, way):
    seen = {kind: way(root, text, Decoding(transparency=kind)) for kind in ("ignored", "white")}
    for kind, images in seen.items():
        assert images
        for image in images:
            mean = image.to("cpu").float().mean()
            assert (mean > 0) == (kind == "white"), "lighter, or darker, than the mean of all pictures"


@pytest.mark.parametrize("way", WAYS)
def test_images_over_the_limit_are_not_decoded(root, text, way):
    # What is skipped is a tuple, in which the test finds no image, or is counted.
    with pytest.raises((TypeError, UserError), match="tuple indices|samples were skipped"):
        way(root, text, Decoding(max_pixels=SIDE * SIDE - 1))
