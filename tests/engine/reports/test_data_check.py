import dataclasses
import json

import pytest

import prune
from configs.pruning import Evaluation, PruneConfig
from configs.sources import Files
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from engine.reports.data_check import Finding, check_data, table
from tests.datasets.pairs.test_shards import png, write_shard


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture
def public(tmp_path, glyphs):
    """Everything that a configuration names, in the public layouts, and shards."""
    export_public(tmp_path, 7, glyphs, side=32)
    (tmp_path / "weights.pth").write_bytes(b"0" * 2_000_000)
    records = [{"image": f"{i}.png", "caption": ["a", "b"]} for i in range(3)]
    (tmp_path / "coco.json").write_text(json.dumps(records))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        write_shard(tmp_path / "shards" / f"{i}.tar", [("a", {"png": png(i), "txt": b"a"})] * 1)
    pretrain, images = tmp_path / "data/pretrain", str(tmp_path / "images")
    return PruneConfig(
        "m.yaml",
        str(tmp_path / "weights.pth"),
        general=[Files(str(pretrain / "cc3m_pretrain.json"), images), Files("", str(tmp_path / "shards/{0..2}.tar"))],
        region=[Files(str(pretrain / "vg_regions.json"), images)],
        evaluation=Evaluation(files=Files(str(tmp_path / "coco.json"), str(tmp_path))),
    )


def test_all_there(public):
    findings = check_data(public)
    assert all(finding.ok for finding in findings)
    assert [(finding.source, finding.detail) for finding in findings] == [
        ("weights", "2.0 MB"),
        ("general", "7 records"),
        ("general", "7 of 7 images looked up are there"),
        ("general", "3 of 3 shards are there, with 3 samples"),
        ("region", "7 records"),
        ("region", "7 of 7 images looked up are there"),
        ("evaluation", "3 records"),
        ("evaluation", "3 of 3 images looked up are there"),
    ]
    lines = table(findings).splitlines()
    assert len(lines) == 9 and lines[-1] == "all 8 there" and all(line.startswith("ok ") for line in lines[:-1])


def test_a_second_source_of_pairs_is_read_as_pairs(public):
    """As BLIP has it; as regions the same records are refused."""
    pairs = dataclasses.replace(public, region=public.general[:1])
    assert all(finding.ok for finding in check_data(pairs, regions=False))
    assert [finding.source for finding in check_data(pairs) if not finding.ok] == ["region"]


def test_bundled_data():
    bundled = PruneConfig("m.yaml", "random", bundled=True, evaluation=Evaluation(bundled_scenes=3))
    findings = check_data(bundled)
    assert [(finding.source, finding.ok) for finding in findings] == [("calibration", True), ("evaluation", True)]
    assert findings[0].detail == "bundled scenes, drawn from 556 glyphs"


def bad(config):
    (finding,) = (finding for finding in check_data(config) if not finding.ok)
    return finding


def test_missing_weights_annotations_and_folders(public, tmp_path):
    (tmp_path / "weights.pth").unlink()
    assert bad(public).detail == "file not found" and "--weights" in bad(public).way
    random = dataclasses.replace(public, weights="random")
    (tmp_path / "coco.json").unlink()
    assert (bad(random).path, bad(random).detail) == (str(tmp_path / "coco.json"), "annotation file not found")
    folder = [finding for finding in check_data(random) if finding.source == "evaluation"][1]
    assert folder.ok and folder.detail == "a folder; its images were not looked up"
    gone = dataclasses.replace(random, evaluation=Evaluation(files=Files("none.json", "nowhere")))
    assert [(f.path, f.ok) for f in check_data(gone)[-2:]] == [("none.json", False), ("nowhere", False)]


def test_annotations_that_are_not_as_expected(public, tmp_path):
    (tmp_path / "coco.json").write_text('[{"image": "0.png"}]')
    assert bad(public).detail.startswith("record 0: no key 'caption'")
    (tmp_path / "coco.json").write_text("{")
    assert bad(public).detail.startswith("not a JSON file")


def test_images_that_are_missing_or_damaged(public, tmp_path):
    (tmp_path / "1.png").unlink()
    assert bad(public).detail == "2 of 3 images looked up are there, not 1.png"
    (tmp_path / "2.png").write_bytes(b"no image")
    assert bad(public).detail.endswith("not 1.png, 1 of them cannot be read, e.g. 2.png")
    tolerant = dataclasses.replace(public, max_skipped=0.7)
    assert all(finding.ok for finding in check_data(tolerant))


def test_many_images_are_sampled(tmp_path, public):
    (tmp_path / "coco.json").write_text(json.dumps([{"image": "0.png", "caption": "a"}] * 1000))
    assert check_data(public)[-1].detail == "64 of 64 images looked up are there"


def test_shards_that_are_missing_or_damaged(public, tmp_path):
    (tmp_path / "shards" / "1.tar").unlink()
    assert bad(public).detail == f"2 of 3 shards are there, with 2 samples; not {tmp_path}/shards/1.tar"
    whole = (tmp_path / "shards" / "2.tar").read_bytes()
    (tmp_path / "shards" / "2.tar").write_bytes(whole[:1000])
    assert "1 of them are damaged, e.g. " in bad(public).detail and "2.tar: the end of" in bad(public).detail
    empty = dataclasses.replace(public, general=[Files(images=str(tmp_path / "*.tar"))])
    assert bad(empty).detail == "0 of 0 shards are there, with 0 samples"
    unbalanced = dataclasses.replace(public, general=[Files(images="{0..2.tar")])
    assert bad(unbalanced).detail.startswith("unbalanced braces")


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("data/pretrain/vg_regions.json", "./download_annots.sh"),
        ("images/coco", "scripts/download_images.sh coco"),
        ("./images/vg/", "scripts/download_images.sh vg"),
        ("images/cc3m/{00000..00331}.tar", "img2dataset"),
        ("elsewhere/*.tar", "img2dataset"),
        ("images/sbu", "img2dataset"),
        ("elsewhere/images/coco", "docs/datasets.md"),
    ],
)
def test_ways_to_get_what_is_missing(path, way):
    finding = Finding("general", path, False, "image folder not found")
    assert finding.way.startswith(way)
    lines = table([finding]).splitlines()
    assert lines[0].startswith("missing  general ") and lines[1].strip().startswith(f"to get it: {way}")
    assert lines[2] == "1 of 1 missing or not whole"


def test_prune_lists_the_data_and_prunes_nothing(public, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            prune.main(["-m", "xvlm", "--check_data", *arguments])
        return stop.value.code, capsys.readouterr().out.splitlines()

    config = {key: value for key, value in dataclasses.asdict(public).items() if key != "evaluation"}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config | {"evaluation": {"bundled_scenes": 2}}))
    code, lines = run("--config", str(path))
    assert code == 0 and lines[0] == str(path) and lines[-1] == "all 7 there"
    code, lines = run("--config", str(path), "--weights", "absent.pth")
    assert code == 1 and lines[1].endswith("absent.pth: file not found") and lines[-1] == "1 of 7 missing or not whole"
    path.write_text("weight: x")
    with pytest.raises(ValueError, match="did you mean 'weights'?"):
        run("--config", str(path))


def test_a_pruner_is_needed_to_prune(capsys):
    with pytest.raises(SystemExit) as stop:
        prune.main(["-m", "xvlm"])
    assert stop.value.code == 2 and "required: -p/--pruner" in capsys.readouterr().err
