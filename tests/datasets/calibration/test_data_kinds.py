"""Calibration batches: bundled or from files, one process or several."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from configs.pretraining import Stage
from configs.pruning import Evaluation, PruneConfig
from configs.sources import Files
from datasets.bundled.curriculum import Curriculum
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from datasets.calibration.data_kinds import Calibration, clear_skipped, skipped_path
from datasets.place import Place

VISION = SimpleNamespace(image_size=32, patch_size=16)
BUNDLED = PruneConfig("m.yaml", "random", bundled=True, batch_size=3, workers=0)


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture(scope="module")
def public(tmp_path_factory, glyphs):
    """Seven images of each kind in the public layouts."""
    root = tmp_path_factory.mktemp("public")
    export_public(root, 7, glyphs, side=48)
    names, images = ("cc3m_pretrain", "sbu_pretrain", "vg_regions"), str(root / "images")
    *general, region = [Files(str(root / f"data/pretrain/{name}.json"), images) for name in names]
    return PruneConfig("m.yaml", "random", general=general, region=[region], batch_size=3, workers=0)


@pytest.fixture
def read(text, tmp_path):
    def read(config, num_batches=4, seed=0, **place):
        return Calibration(config, text, VISION, tmp_path, num_batches=num_batches, seed=seed, **place)

    return read


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key].to("cpu"), b[key].to("cpu")) for key in a)


@pytest.fixture(params=["bundled", "public"])
def config(request):
    return BUNDLED if request.param == "bundled" else request.getfixturevalue("public")


def test_general_and_region_batches_take_turns(read, config):
    data = read(config, num_batches=2)
    batches = list(data)
    assert len(batches) == len(data) == 4
    assert ["idx_to_group_img" in batch for batch in batches] == [False, True, False, True]
    for batch in batches:
        assert batch["image"].shape == (3, 3, 32, 32) and batch["text_ids"].shape == batch["text_atts"].shape
        if "idx_to_group_img" in batch:
            regions = len(batch["idx_to_group_img"])
            assert batch["image_atts"].shape == (regions, 5) and batch["target_bbox"].shape == (regions, 4)
            assert set(batch["idx_to_group_img"].tolist()) == {0, 1, 2} and len(batch["text_ids"]) == regions


@pytest.mark.script
def test_the_seed_decides(read, config):
    first, again, other = (list(read(config, num_batches=2, seed=seed)) for seed in (1, 1, 2))
    assert all(map(same, first, again)) and not any(map(same, first, other))


@pytest.mark.script
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(read, config, workers):
    alone = list(read(config, num_batches=2))
    helped = list(read(dataclasses.replace(config, workers=workers), num_batches=2))
    assert all(map(same, alone, helped)) and len(alone) == len(helped)


@pytest.mark.script
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_each_batch_once(read, world_size):
    whole = list(read(BUNDLED, num_batches=5))
    parts = [list(read(BUNDLED, num_batches=5, place=Place(rank, world_size))) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        expected = [batch for i, batch in enumerate(whole) if i // 2 % world_size == rank]
        assert len(part) == len(expected) and all(map(same, part, expected))


def test_epochs_are_fresh_batches_and_ranks_share_them(read, public):
    config = dataclasses.replace(public, batch_size=2)
    data = read(config, num_batches=3)
    whole = [batch for epoch in range(3) for batch in data.at(epoch)]
    assert len(whole) == 18 and data.epoch == 0
    assert [n for epoch in range(3) for n in data.at(epoch).numbers] == list(range(18))
    seen = {int(batch["image"].sum() * 1e4) for batch in whole}
    assert len(seen) == 18, "no batch comes twice"
    for rank in range(2):
        part = read(config, num_batches=3, place=Place(rank, 2))
        for epoch in range(3):
            for number, batch in zip(part.at(epoch).numbers, part.at(epoch), strict=True):
                assert same(batch, whole[number]) and number // 2 % 2 == rank


@pytest.mark.script
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_round_is_a_batch_of_each_kind(read, world_size):
    whole = read(BUNDLED, num_batches=5)
    ranks = [read(BUNDLED, num_batches=5, place=Place(rank, world_size)).at(2) for rank in range(world_size)]
    assert [sum(own) for own in zip(*(rank.rounds for rank in ranks), strict=True)] == [2] * 5
    assert all(sum(rank.rounds) == len(rank) for rank in ranks)
    kinds = ["idx_to_group_img" in batch for batch in whole]
    assert whole.rounds == [2] * 5 and all({*kinds[i : i + 2]} == {False, True} for i in range(0, 10, 2))


@pytest.mark.parametrize("shares", [[3, 2, 5], [1, 6, 7], [2, 2, 4], [5, 5]])
def test_rounds_hold_with_several_sources_of_a_kind(read, shares):
    data = read(BUNDLED, num_batches=shares[-1])
    data.shares = shares
    source = {number: i == len(shares) - 1 for number, i, _ in data._turns()}
    assert data.rounds == [2] * shares[-1]
    assert all(source[number] != source[number + 1] for number in range(0, 2 * shares[-1], 2))


def test_a_rank_without_a_batch_reads_none(read):
    data = read(BUNDLED, num_batches=1, place=Place(1, 2))
    assert len(data) == 0 and list(data) == []


def test_less_data_than_asked_for_is_said(read, public, caplog):
    with caplog.at_level(logging.INFO):
        data = read(public, num_batches=100)
    assert len(data) == 2 * 2  # 14 pairs, but 7 images with regions, 3 to a batch
    assert "has 2 batches, fewer than the 100 asked for" in caplog.text
    assert len(list(data)) == 4


def test_a_source_alone_and_smaller_than_a_batch(read, public):
    only = dataclasses.replace(public, region=[], batch_size=50)
    (batch,) = read(only, num_batches=9)
    assert len(batch["image"]) == 14


def test_unreadable_images_are_listed_and_too_many_are_an_error(read, text, tmp_path, glyphs):
    export_public(tmp_path / "p", 6, glyphs, side=48)
    broken = sorted((tmp_path / "p/images/cc3m/bundled").iterdir())[2]
    broken.write_bytes(b"no image")
    files = [Files(str(tmp_path / "p/data/pretrain/cc3m_pretrain.json"), str(tmp_path / "p/images"))]
    config = PruneConfig("m.yaml", "random", general=files, batch_size=3, workers=0, max_skipped=0.2)
    batches = list(read(config, num_batches=2))
    assert sorted(len(batch["image"]) for batch in batches) == [2, 3]
    assert str(broken) in (tmp_path / "skipped.txt").read_text()
    lenient = dataclasses.replace(config, max_skipped=0.5)
    for rank in range(2):
        assert len(list(read(lenient, num_batches=2, place=Place(rank, 2)))) == 1
    with pytest.raises(ValueError, match="1 of 6 samples were skipped"):
        list(read(dataclasses.replace(config, max_skipped=0.1), num_batches=2))
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 1, "several passes list an image once"


def test_each_run_begins_its_lists_anew_and_leaves_those_of_other_ranks(tmp_path):
    lists = [skipped_path(tmp_path, rank) for rank in range(4)]
    assert [path.name for path in lists] == ["skipped.txt", *(f"skipped_rank{rank}.txt" for rank in (1, 2, 3))]
    for path in lists:
        path.write_text("old.jpg\tbroken\n")
    (tmp_path / "skipped_by_hand.txt").touch()
    clear_skipped(tmp_path, Place(1, 2))
    assert [path.exists() for path in lists] == [True, False, True, True]
    lists[1].write_text("new.jpg\tbroken\n")
    clear_skipped(tmp_path, Place(0, 2))
    assert [path.exists() for path in lists] == [False, True, False, False]
    assert (tmp_path / "skipped_by_hand.txt").exists()
    clear_skipped(tmp_path / "nowhere", Place())


def test_a_calibration_that_goes_on_keeps_its_list(tmp_path):
    listed = skipped_path(tmp_path, 0)
    listed.write_text("of/the/first/half.jpg\tbroken\n")
    (tmp_path / "chita_epoch0_rank0.rows").touch()
    clear_skipped(tmp_path, Place())
    assert listed.exists()
    (tmp_path / "chita_epoch0_rank0.rows").unlink()
    clear_skipped(tmp_path, Place())
    assert not listed.exists()


@pytest.mark.parametrize(
    "content", ["[]", "{}", "not json", '[{"image": "x.png"}]', '[{"image": "x.png", "caption": "c", "elems": []}]']
)
def test_bad_annotations_are_named_before_anything_is_read(read, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    files = [Files(str(tmp_path / "bad.json"), str(tmp_path))]
    for general, region in ((files, []), ([], files)):
        with pytest.raises((ValueError, FileNotFoundError), match="bad.json") as caught:
            read(PruneConfig("m.yaml", "random", general=general, region=region))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"max_skipped": 1.5}, "max_skipped must be a fraction between 0 and 1, got 1.5"),
        ({"general": [Files("a", "b")]}, "not both"),
    ],
)
def test_values_that_cannot_be(change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(BUNDLED, **change)


def test_values_of_evaluation_and_stages_that_cannot_be():
    for kind, change, told in (
        (Evaluation, {"k_test": -1}, "k_test must be at least 0"),
        (Evaluation, {"bundled_scenes": -1}, "bundled_scenes must be at least 0"),
        (Evaluation, {"bundled_scenes": 1, "files": Files("a", "b")}, "not both"),
        (Stage, {"steps": 0}, "steps must be at least 1"),
        (Stage, {"fused_pairs": 0}, "fused_pairs must be at least 1"),
        (Stage, {"region_images": -1}, "region_images must be at least 0"),
        (Stage, {"objectives": []}, "objectives must name at least one loss"),
    ):
        stage = {"steps": 1, "batch_size": 1, "max_objects": 1, "objectives": ["itc"]}
        with pytest.raises(ValueError, match=told):
            kind(**(stage if kind is Stage else {}) | change)


def test_missing_data_is_named(tmp_path):
    nothing = PruneConfig("m.yaml", "random")
    with pytest.raises(ValueError, match="c.yaml: no calibration data: set bundled: true, or give general and region"):
        nothing.check_calibration("c.yaml")
    with pytest.raises(ValueError, match="c.yaml: no evaluation data"):
        nothing.check_evaluation("c.yaml")
    with pytest.raises(FileNotFoundError, match="absent.json: annotation file not found; docs/datasets.md"):
        dataclasses.replace(nothing, general=[Files("absent.json", ".")]).check_calibration("c.yaml")
    (tmp_path / "a.json").touch()
    files = Files(str(tmp_path / "a.json"), str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent: image folder not found; docs/datasets.md"):
        dataclasses.replace(nothing, evaluation=Evaluation(files=files)).check_evaluation("c.yaml")
    BUNDLED.check_calibration("c.yaml")
    with pytest.raises(FileNotFoundError, match="absent.pth: weights file not found; give --weights PATH"):
        dataclasses.replace(nothing, weights="absent.pth").check_weights()
    nothing.check_weights()


STAGES = [Stage(2, 3, 1, ["itc"]), Stage(3, 2, 4, ["itc", "bbox"], region_images=2, fused_pairs=1)]


def curriculum(glyphs, text, stages=STAGES, **options):
    config = SimpleNamespace(stages=stages, workers=0, epoch_length=5)
    return Curriculum(config, glyphs, text, VISION, **{"seed": 0} | options)


def test_stages_follow_each_other_from_any_step_on(glyphs, text):
    data = curriculum(glyphs, text)
    steps = list(data.steps(0))
    assert len(data) == len(steps) == 5
    assert [list(step["sources"]) for step in steps] == [["general"]] * 2 + [["general", "region"]] * 3
    assert [len(step["sources"]["general"]["image"]) for step in steps] == [3, 3, 2, 2, 2]
    assert [(s["objectives"], s["fused_pairs"]) for s in steps] == [(["itc"], None)] * 2 + [(["itc", "bbox"], 1)] * 3
    for start in range(6):
        rest = list(data.steps(start))
        assert len(rest) == 5 - start
        for resumed, expected in zip(rest, steps[start:], strict=True):
            assert all(same(resumed["sources"][kind], expected["sources"][kind]) for kind in expected["sources"])


def test_ranks_read_different_batches(glyphs, text):
    data = curriculum(glyphs, text)
    for a, b in zip(data.steps(0, Place(0, 2)), data.steps(0, Place(1, 2)), strict=True):
        assert not torch.equal(a["sources"]["general"]["image"], b["sources"]["general"]["image"])


def test_a_stage_that_cannot_be_is_refused_at_the_start(glyphs, text):
    with pytest.raises(ValueError, match="max_objects must be between 1 and 4, got 9"):
        curriculum(glyphs, text, [*STAGES, Stage(1, 1, 9, ["itc"])])
    with pytest.raises(ValueError, match="c.yaml: unknown objective 'itd'; the model has itc, itm"):
        Stage(1, 1, 1, ["itc", "itd"]).check(("itc", "itm"), "c.yaml")
