"""The bundled artwork and the scenes drawn from it."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.bundled.captions import MAX_CAPTION_WORDS
from datasets.bundled.export import export_public
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRegions, BundledRetrieval, BundledScenes, draw_scene
from datasets.pairs.pretraining import ImageTextDataset
from datasets.pairs.regions import RegionDataset
from datasets.tasks.retrieval import RetrievalEvalDataset
from datasets.text import TextEncoder, clean_caption
from datasets.transforms import CLIP_MEAN, CLIP_STD, EvalTransform
from models.parts.tokenizer import WordPiece

pytestmark = pytest.mark.script

ROOT = Path("data/bundled")


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs(ROOT)


@pytest.fixture(scope="module")
def tokenizer():
    return WordPiece("data/vocab/mini_vocab.txt")


def keep_text(caption, rng):
    """An encoder that shows the caption and where the generator stands."""
    return {"caption": caption, "draw": rng.random()}


def same(a, b):
    """Whether two items are equal, tensors exactly."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


def in_pixels(image):
    """A normalised tensor (3, H, W) as uint8 (H, W, 3)."""
    levels = image.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (255 * levels).round().to(torch.uint8).numpy()


def named_once(caption, names, all_names):
    """Whether a caption is made of exactly these names, once each, and words of position and grammar."""
    rest = f" {caption} "
    for name in sorted(names, key=len, reverse=True):  # "ice cream" is in "soft ice cream"
        before, found, after = rest.partition(f" {name} ")
        if not found:
            return False
        rest = f"{before} | {after}"
    return not any(re.search(rf"\b{re.escape(name)}\b", rest) for name in all_names)


# ---- the pack


def test_pack_is_what_concepts_json_says(glyphs):
    pack = json.loads((ROOT / "concepts.json").read_text())
    digest = hashlib.sha256()
    for vendor in pack["vendors"]:
        digest.update(np.ascontiguousarray(glyphs.images[vendor["key"]]).tobytes())
    assert digest.hexdigest() == pack["sha256"]
    assert [concept["index"] for concept in pack["concepts"]] == list(range(len(glyphs)))
    assert {image.shape for image in glyphs.images.values()} == {(len(glyphs), pack["size"], pack["size"], 4)}
    assert all((image[..., 3] > 128).any((1, 2)).all() for image in glyphs.images.values())
    assert sum(path.stat().st_size for path in ROOT.iterdir() if path.is_file()) < 8e6


def test_names_are_distinct_clean_captions_without_sides(glyphs):
    assert 300 <= len(glyphs) <= 600 and len(set(glyphs.names)) == len(glyphs)
    places = {"left", "right", "bottom", "middle", "above", "below", "then"}
    for name in glyphs.names:
        assert name == clean_caption(name, 4) and name.isascii() and not places & set(name.split())
    code_points = [concept["code_point"] for concept in glyphs.concepts]
    assert len(set(code_points)) == len(glyphs)


def test_attribution_lists_every_vendor_and_licence():
    text = (ROOT / "ATTRIBUTION.md").read_text()
    for vendor in json.loads((ROOT / "concepts.json").read_text())["vendors"]:
        assert f"`{vendor['key']}.webp`" in text and vendor["title"] in text
    for path in (ROOT / "licences").iterdir():
        assert f"licences/{path.name}" in text and path.stat().st_size > 1000
    assert "CC-BY 4.0" in text and "MIT" in text and "changed" in text


@pytest.mark.script
def test_no_two_concepts_look_alike_in_a_font(glyphs):
    """Independently of how they were chosen: root mean square distances at 12 x 12 pixels over white and over black."""
    for images in glyphs.images.values():
        alpha = images[..., 3:] / 255
        over = [images[..., :3] * alpha + ground * (1 - alpha) for ground in (255, 0)]
        flat = np.concatenate([image.reshape(-1, 12, 6, 12, 6, 3).mean((2, 4)).reshape(-1, 432) for image in over], 1)
        squares = (flat**2).sum(1)
        apart = squares[:, None] + squares - 2 * flat @ flat.T
        np.fill_diagonal(apart, np.inf)
        assert np.sqrt(apart.min() / 864) > 15  # of 255 levels


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="concepts.json.*rebuild_bundled.sh"):
        load_glyphs(tmp_path)
    (tmp_path / "concepts.json").write_text((ROOT / "concepts.json").read_text())
    with pytest.raises(FileNotFoundError, match="twemoji.webp"):
        load_glyphs(tmp_path)


# ---- scenes


@pytest.mark.parametrize("n_objects", [1, 2, 3, 4])
@pytest.mark.parametrize("augment", [True, False])
def test_scene_is_true_to_its_boxes_and_captions(glyphs, n_objects, augment):
    for seed in range(25):
        scene = draw_scene(glyphs, np.random.default_rng(seed), glyphs.train_vendors, 96, n_objects, augment)
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        assert len({item.concept for item in scene.objects}) == len(scene.objects) == n_objects
        for item in scene.objects:
            x, y, w, h = item.box
            assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 96 and y + h <= 96
            assert item.vendor in glyphs.train_vendors and item.name == glyphs.names[item.concept]
        names = [item.name for item in scene.objects]
        assert named_once(scene.caption.removeprefix("a ").removeprefix("an "), names, glyphs.names)
        assert len(scene.caption.split()) <= MAX_CAPTION_WORDS and scene.caption == clean_caption(scene.caption, 40)
        for item, caption in zip(scene.objects, scene.region_captions, strict=True):
            assert item.name in caption


def test_boxes_are_where_pixels_changed(glyphs):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = draw_scene(glyphs, rng, ["fluent"], 96, 1 + seed % 4, augment=False, background="plain")
        covered = np.zeros((96, 96), bool)
        for item in scene.objects:
            x, y, w, h = item.box
            covered[y : y + h, x : x + w] = True
        ground = scene.image[~covered][0]
        changed = (scene.image != ground).any(-1)
        assert not changed[~covered].any()
        for item in scene.objects:  # and tight: something is drawn within two pixels of every edge
            x, y, w, h = item.box
            part = changed[y : y + h, x : x + w]
            assert part[:2].any() and part[-2:].any() and part[:, :2].any() and part[:, -2:].any()


def test_objects_hardly_overlap(glyphs):
    for seed in range(60):
        scene = draw_scene(glyphs, np.random.default_rng(seed), glyphs.train_vendors, 64, 4)
        cover = np.zeros((64, 64), int)
        for item in scene.objects:
            x, y, w, h = item.box
            cover[y : y + h, x : x + w] += 1
        assert (cover > 1).sum() <= 6 * 0.08 * min(item.box[2] * item.box[3] for item in scene.objects) + 1


def test_positions_and_relations_are_true(glyphs):
    for seed in range(120):
        scene = draw_scene(glyphs, np.random.default_rng(seed), glyphs.train_vendors, 96, 2)
        places = {item.name: item.centre for item in scene.objects}
        for a, b in (scene.objects, scene.objects[::-1]):
            (ax, ay), (bx, by) = places[a.name], places[b.name]
            truth = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
            for relation, holds in truth.items():
                assert holds or f"{a.name} {relation} {b.name}" not in scene.caption
        for item in scene.objects:
            x, y = places[item.name]
            for word, holds in (("left", x < 48), ("right", x > 48), ("top", y < 48), ("bottom", y > 48)):
                assert holds or word not in item.position.split()
        if "then" in scene.caption:
            first, second = sorted(places, key=lambda name: places[name][0])
            assert scene.caption == f"{first} then {second} from left to right"


def test_captions_fit_the_tokens_of_the_model(glyphs, tokenizer):
    longest = sorted(glyphs.names, key=lambda name: -len(tokenizer.encode(name)))[:4]
    concepts = [glyphs.names.index(name) for name in longest]
    for seed in range(30):
        scene = draw_scene(glyphs, np.random.default_rng(seed), glyphs.train_vendors, 96, 4, concepts=concepts)
        assert len(tokenizer.encode(scene.caption)) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_objects": 5}, "n_objects"),
        ({"n_objects": 2, "concepts": [3, 3]}, "concepts"),
        ({"n_objects": 0}, "got 0"),
        ({"side": 8}, "side"),
    ],
)
def test_bad_scene_is_refused(glyphs, options, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(glyphs, np.random.default_rng(0), glyphs.train_vendors, **options)


# ---- datasets


@pytest.mark.parametrize(("kind", "options"), [(BundledScenes, {}), (BundledRegions, {"patch": 16})])
def test_items_depend_on_seed_epoch_and_index_only(kind, options):
    numbers = [0, 7, 19, 27, 399, 5]
    one = kind(load_glyphs(ROOT), keep_text, 20, seed=1, **options)
    two = kind(load_glyphs(ROOT), keep_text, 20, seed=1, **options)
    two.glyphs._room = 20_000  # a cache that hardly keeps anything must not show
    forward = {n: one[n] for n in numbers}
    backward = {n: two[n] for n in reversed(numbers)}
    assert all(same(forward[n], backward[n]) for n in numbers)
    assert not same(one[7], one[27])  # the same index in the next epoch
    assert not same(one[7], kind(one.glyphs, keep_text, 20, seed=2, **options)[7])
    test = kind(one.glyphs, keep_text, 20, seed=1, split="test", **options)
    assert same(test[7], test[27]) and not same(test[7], one[7])


def test_scene_item_has_the_fields_of_the_encoder(glyphs, tokenizer):
    items = BundledScenes(glyphs, TextEncoder(tokenizer, 40), 10, side=64)
    item = items[3]
    fields = {"text_ids", "text_atts", "text_ids_masked", "masked_pos", "masked_ids"}
    assert fields | {"image"} <= item.keys()
    scene, _ = items.scene(3)
    assert np.array_equal(in_pixels(item["image"]), scene.image)
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32


def test_samples_of_the_same_concepts_share_their_number(glyphs):
    items = BundledScenes(glyphs, keep_text, 300, max_objects=2)
    drawn = {}
    for n in range(300):
        scene, _ = items.scene(n)
        concepts = frozenset(item.concept for item in scene.objects)
        drawn.setdefault(concepts, set()).add(items.sample_id(scene.objects).item())
    assert all(len(ids) == 1 for ids in drawn.values())
    assert len(set().union(*drawn.values())) == len(drawn)


@pytest.mark.parametrize(("side", "patch"), [(96, 16), (64, 8)])
def test_regions(glyphs, side, patch):
    items = BundledRegions(glyphs, keep_text, 30, patch=patch, side=side)
    for n in range(30):
        scene, _ = items.scene(n)
        whole, *parts = items[n]["regions"]
        assert whole["caption"] == scene.caption and whole["is_image"] == 1 and whole["image_atts"].all()
        assert whole["target_bbox"].tolist() == [0.5, 0.5, 1, 1]
        for item, caption, part in zip(scene.objects, scene.region_captions, parts, strict=True):
            x, y, w, h = item.box
            cx, cy, pw, ph = part["target_bbox"].tolist()
            assert part["caption"] == caption and part["is_image"] == 0
            assert np.allclose(np.array([cx - pw / 2, cy - ph / 2, pw, ph]) * side, item.box, atol=1e-3)
            pixels = np.zeros((side, side), int)
            pixels[y : y + h, x : x + w] = 1
            grid = side // patch
            touched = pixels.reshape(grid, patch, grid, patch).any((1, 3)).flatten()
            assert part["image_atts"].tolist() == [1, *touched]


def test_training_never_shows_the_unseen_font(glyphs):
    assert glyphs.unseen_vendor not in glyphs.train_vendors
    items = BundledScenes(glyphs, keep_text, 200)
    shown = {item.vendor for n in range(200) for item in items.scene(n)[0].objects}
    assert shown == set(glyphs.train_vendors)
    for split, vendors in (("scenes", shown), ("unseen_scenes", {"fluent"}), ("unseen_glyphs", {"fluent"})):
        test = BundledRetrieval(glyphs, split, 60)
        assert {item.vendor for i in range(60) for item in test.scene(i).objects} == vendors


@pytest.mark.parametrize("split", ["scenes", "unseen_scenes", "unseen_glyphs"])
def test_retrieval_sets_are_fixed_and_distinct(glyphs, split):
    items = BundledRetrieval(glyphs, split, 1000, side=32)
    assert len(items) == (len(glyphs) if split == "unseen_glyphs" else 1000)
    scenes = [items.scene(i) for i in range(len(items))]
    assert len({scene.caption for scene in scenes}) == len(items)
    assert len({frozenset(item.concept for item in scene.objects) for scene in scenes}) == len(items)
    if split == "unseen_glyphs":
        assert {scene.caption for scene in scenes} == set(glyphs.names)
    again = BundledRetrieval(load_glyphs(ROOT), split, 1000, side=32)
    assert all(same(again[i], items[i]) for i in (5, 0, len(items) - 1))
    assert set(items[0]) == {"image", "caption"} and sum(1 for _ in items) == len(items)


def test_bad_datasets_are_refused(glyphs):
    for options in ({"split": "val"}, {"max_objects": 5}, {"length": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            BundledScenes(glyphs, keep_text, **{"length": 10, **options})
    with pytest.raises(ValueError, match="multiple of patch"):
        BundledRegions(glyphs, keep_text, 10, patch=7)
    with pytest.raises(ValueError, match="split"):
        BundledRetrieval(glyphs, "train")
    with pytest.raises(ValueError, match="different captions"):
        BundledRetrieval(glyphs, "scenes", 1000, max_objects=1)
    with pytest.raises(IndexError):
        BundledScenes(glyphs, keep_text, 10)[-1]


# ---- the public layouts


def test_export_is_read_by_the_public_datasets(glyphs, tokenizer, tmp_path):
    files = export_public(tmp_path, 6, glyphs, side=64)
    assert all(path.is_file() for path in files) and not list(tmp_path.rglob("*.part"))
    pretrain, images, encode = tmp_path / "data/pretrain", tmp_path / "images", TextEncoder(tokenizer, 40)
    names = ("cc3m_pretrain", "sbu_pretrain", "coco_karpathy_gby_image", "vg_dense_gby_image")
    sources = [(pretrain / f"{name}.json", images / name.partition("_")[0]) for name in names]
    pairs = ImageTextDataset(sources, lambda image, rng: EvalTransform(64)(image), encode, seed=0)
    assert len(pairs) == 24 and all(pairs[n]["image"].shape == (3, 64, 64) for n in range(24))
    regions = RegionDataset([(pretrain / "vg_regions.json", images / "vg")], encode, 64, 16, seed=0)
    assert len(regions) == 6 and all(regions[n]["regions"] for n in range(6))
    itr = tmp_path / "data/finetune/itr"
    test = RetrievalEvalDataset(itr / "coco_test.json", images / "coco", EvalTransform(64))
    expected = BundledRetrieval(glyphs, "scenes", 6, side=64)
    assert test.texts == [expected[i]["caption"] for i in range(6)]
    assert all(torch.allclose(test[i]["image"], expected[i]["image"], atol=1e-5) for i in range(6))
    for record in json.loads((itr / "coco_train.json").read_text()):
        assert isinstance(record["caption"], str) and record["image_id"]
        assert (images / "coco" / record["image"]).is_file()
    assert not re.search(r"\b(left|right|above|below)\b", (pretrain / "vg_regions.json").read_text())


def test_exported_boxes_hold_the_glyphs(glyphs, tmp_path):
    export_public(tmp_path, 4, glyphs, side=64)
    for record in json.loads((tmp_path / "data/pretrain/vg_regions.json").read_text()):
        with Image.open(tmp_path / record["image"]) as image:
            assert image.size == (64, 64)
        assert record["caption"] == " and ".join(elem["caption"] for elem in record["elems"])
        for x, y, w, h in (elem["bb"] for elem in record["elems"]):
            assert 0 <= x < x + w <= 64 and 0 <= y < y + h <= 64


def test_export_is_repeatable_and_overwrites_nothing(glyphs, tmp_path):
    written = []
    for root in (tmp_path / "a", tmp_path / "b"):
        assert len(export_public(root, 2, glyphs, side=48)) == 8
        written.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")})
    assert written[0] == written[1]
    with pytest.raises(ValueError, match="cc3m_pretrain.json: already exists"):
        export_public(tmp_path / "a", 2, glyphs)
    with pytest.raises(ValueError, match="n_images"):
        export_public(tmp_path / "c", 0, glyphs)
