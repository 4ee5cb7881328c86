"""configs/prune/general_loader_*.yaml: the published keys, what becomes of them, and what is refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from configs.general_loader import DATASETS, GeneralLoader
from configs.loading import load_config, save_config
from configs.pruning import LabelsPruneConfig, PruneConfig
from configs.sources import Files, LabelledImages
from datasets.annotations import ImageRoot
from datasets.calibration.data_kinds import Calibration
from datasets.pairs.pretraining import ImageTextDataset
from datasets.transforms import to_tensor
from engine.reports.data_check import check_data

CONFIGS = Path("configs")


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys))
    return str(path)


@pytest.mark.parametrize("name", ["xvlm", "blip", "dino"])
def test_the_files_that_come_with_the_project_fit_their_models(name):
    schema = LabelsPruneConfig if name == "dino" else PruneConfig
    config = load_config(CONFIGS / name / "prune_base.yaml", schema)
    assert config.general_loader == f"configs/prune/general_loader_{name}.yaml"
    with pytest.raises(FileNotFoundError, match="data/|images/"):  # the sizes are those of the model
        config.check_calibration("c.yaml")
    loader = load_config(config.general_loader, GeneralLoader)
    assert loader.image_res and loader.patch_size and loader.batch_size == config.batch_size
    assert {loader.cc3m_image_root, loader.sbu_image_root} == {"images/cc3m/", "images/sbu/"}


def test_regions_are_the_second_source_where_there_are_some():
    files = {f"{name}_file": f"{name}.json" for name in DATASETS}
    loader = GeneralLoader(**files, region_files=["a.json", "b.json"], vg_image_root="vg")
    assert [file for file, _ in loader.general] == ["cc3m.json", "sbu.json", "coco.json", "vg.json"]
    assert loader.region == [("a.json", "vg"), ("b.json", "vg")]
    pairs = GeneralLoader(**files, cc3m_image_root="elsewhere")
    assert pairs.general == [("cc3m.json", "elsewhere"), ("sbu.json", "images/sbu/")]
    assert pairs.region == [("coco.json", "images/coco/"), ("vg.json", "images/vg/")]


def test_a_configuration_takes_what_the_loader_says(tmp_path):
    path = write(tmp_path / "g.yaml", cc3m_file="a.json", sbu_image_root="s", region_files=["r.json"], batch_size=3)
    config = PruneConfig("m.yaml", "random", general_loader=path)
    roots = {"cc3m": "images/cc3m/", "sbu": "s", "coco": "images/coco/", "vg": "images/vg/"}
    assert config.general == [Files("a.json", "images/cc3m/", roots)]
    assert config.region == [Files("r.json", "images/vg/", roots)]
    assert config.batch_size == 3
    assert dataclasses.replace(config, workers=4).general == config.general
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", PruneConfig) == config
    classifier = LabelsPruneConfig("m.yaml", "random", general_loader=write(tmp_path / "d.yaml", root="here"))
    assert classifier.images == LabelledImages("imagenet", "train", "here") and classifier.batch_size == 8


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"cc3m_image_rot": "x"}, "unknown key 'cc3m_image_rot'; did you mean 'cc3m_image_root'?"),
        ({"cc3m_file": 3}, "cc3m_file: expected a text, got 3"),
        ({"region_files": "r.json"}, "region_files: expected a list, got 'r.json'"),
        ({"cc3m_file": "a.json", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"caption_key": "text"}, "caption_key is always 'caption' here, got 'text': leave it out"),
        ({"use_test_transform": True}, "use_test_transform is always False here"),
        ({"mask_prob": 0.3}, "mask_prob is always 0.25 here, got 0.3"),
        ({"root": "r", "cc3m_file": "a.json"}, "set root, for models that classify, or files of image-text pairs"),
        ({"root": "r"}, "names no data for this kind of model"),
        ({}, "names no data for this kind of model"),
    ],
)
def test_what_a_loader_cannot_say(tmp_path, keys, told):
    path = write(tmp_path / "g.yaml", **keys)
    config = write(tmp_path / "c.yaml", model_config="m.yaml", weights="random", general_loader=path)
    with pytest.raises(ValueError) as caught:
        load_config(config, PruneConfig)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{config}: {path}: ")


def test_a_loader_beside_other_files_or_none_at_all(tmp_path):
    path = write(tmp_path / "g.yaml", cc3m_file="a.json")
    with pytest.raises(ValueError, match="set general_loader, or general and region, not both"):
        PruneConfig("m.yaml", "random", general_loader=path, general=[Files("b.json", "b")])
    with pytest.raises(ValueError, match="not both"):
        PruneConfig("m.yaml", "random", general_loader=path, bundled=True)
    with pytest.raises(FileNotFoundError, match="none.yaml: configuration file not found"):
        PruneConfig("m.yaml", "random", general_loader="none.yaml")
    with pytest.raises(ValueError, match="names no data for this kind of model"):
        LabelsPruneConfig("m.yaml", "random", general_loader=path)
    with pytest.raises(ValueError, match="roots are for annotation files"):
        Files(images="{0..3}.tar", roots={"cc3m": "c"})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"image_res": 384}, "image_res is 384, but image_size of the model is 32"),
        ({"patch_size": 14}, "patch_size is 14, but patch_size of the model is 16"),
        ({"max_tokens": 30}, "max_tokens is 30, but max_tokens of the model is 24"),
        ({"max_words": 23}, "max_words must be at least the model's max_tokens = 24"),
    ],
)
def test_a_loader_for_another_model(tmp_path, keys, told):
    path = write(tmp_path / "g.yaml", cc3m_file="a.json", **keys)
    config = PruneConfig("tests/data/configs/model.yaml", "random", general_loader=path)
    with pytest.raises(ValueError) as caught:
        config.check_calibration("c.yaml")
    assert str(caught.value) == f"{path}: {told}"
    fits = write(tmp_path / "f.yaml", cc3m_file="a.json", image_res=32, patch_size=16, max_tokens=24, max_words=40)
    with pytest.raises(FileNotFoundError, match="a.json: annotation file not found"):
        dataclasses.replace(config, general=[], general_loader=fits).check_calibration("c.yaml")


@pytest.fixture
def mixed(tmp_path, write_image):
    """One annotation file with images of two datasets and of none, in three folders, under the same names."""
    pixels = {name: write_image(tmp_path / name / "1.png", (16, 16), i) for i, name in enumerate(("c", "s", "rest"))}
    records = [{"image": "1.png", "caption": "a dog", "dataset": name} for name in ("sbu", "cc3m", "other", "sbu")]
    del records[2]["dataset"]
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    return tmp_path, pixels


def test_the_dataset_of_a_record_says_where_its_image_is(mixed, text):
    folder, pixels = mixed
    roots = {"cc3m": str(folder / "c"), "sbu": str(folder / "s")}
    files = Files(str(folder / "mixed.json"), str(folder / "rest"), roots)
    data = ImageTextDataset([(files.annotations, files.folders)], lambda image, rng: to_tensor(image), text, seed=0)
    shown = [data[n]["image"] for n in range(len(data))]
    expected = {name: to_tensor(ImageRoot(folder / name).load("1.png")) for name in pixels}
    names = [next(name for name, image in expected.items() if image.equal(one)) for one in shown]
    assert names == ["s", "s", "c", "rest"]


def test_calibration_and_the_list_of_the_data_follow_the_loader(mixed, text):
    folder, _ = mixed
    keys = {"cc3m_file": str(folder / "mixed.json"), "cc3m_image_root": str(folder / "c"), "batch_size": 2}
    path = write(folder / "g.yaml", **keys, sbu_image_root=str(folder / "s"))
    config = PruneConfig("m.yaml", "random", workers=0, general_loader=path)
    data = Calibration(config, text, SimpleNamespace(image_size=16, patch_size=8), folder / "out", 2, seed=0)
    assert [len(batch["image"]) for batch in data] == [2, 2]
    findings = check_data(config)
    assert all(finding.ok for finding in findings)
    assert [(finding.source, finding.path) for finding in findings] == [
        ("loader", path),
        ("general", str(folder / "mixed.json")),
        ("general", str(folder / "s")),
        ("general", str(folder / "c")),
    ]
    (folder / "s" / "1.png").unlink()
    assert [finding.path for finding in check_data(config) if not finding.ok] == [str(folder / "s")]
    with pytest.raises(FileNotFoundError, match="none of 2 images of .*mixed.json is in this folder"):
        Calibration(config, text, SimpleNamespace(image_size=16, patch_size=8), folder / "out", 2, seed=0)
