"""Single bundled glyphs with labels: what is drawn, in which fonts, and that it follows from (seed, epoch, index)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.bundled.classification import (
    BACKGROUNDS,
    SIZES,
    VARIATIONS,
    BundledClassification,
    recoloured,
    warped,
)
from datasets.bundled.glyphs import Glyphs, load_glyphs
from datasets.transforms import IMAGENET

SIDE = 40


@pytest.fixture(scope="module")
def glyphs():
    return load_glyphs()


@pytest.fixture(scope="module")
def unseen(glyphs):
    return BundledClassification(glyphs, "unseen", side=SIDE)


def test_labels_are_the_subcategories_in_alphabetical_order(glyphs, unseen):
    concepts = json.loads(Path("data/bundled/concepts.json").read_text())["concepts"]
    assert list(unseen.class_names) == sorted({concept["subcategory"] for concept in concepts})
    assert len(unseen.class_names) == 76
    for n in (0, 300, len(glyphs) + 5):
        item, concept = unseen[n], concepts[n % len(glyphs)]
        assert unseen.class_names[item["label"]] == concept["subcategory"] and item["fine_label"] == n % len(glyphs)


def test_the_test_set_has_every_concept_at_all_sizes_on_all_backgrounds(glyphs, unseen):
    assert len(unseen) == len(glyphs) * len(SIZES) * len(BACKGROUNDS) >= 5000
    labels = [unseen.draw(n)[1] for n in range(0, len(unseen), 7)]
    assert labels == [n % len(glyphs) for n in range(0, len(unseen), 7)]
    drawn = [unseen.draw(17 + variation * len(glyphs))[0] for variation in range(VARIATIONS)]
    assert len({image.tobytes() for image in drawn}) == VARIATIONS
    for name, image in zip(BACKGROUNDS, drawn[:: len(SIZES)], strict=True):
        corners = [tuple(image[y, x]) for y in (0, -1) for x in (0, -1)]  # a glyph of this size covers one at most
        assert (max(map(corners.count, corners)) >= 3) == (name == "plain")


def test_no_glyph_of_a_test_image_is_cut_off_or_changed(glyphs, unseen):
    for n in (3, 3 + len(glyphs), 3 + 2 * len(glyphs)):
        image, concept = unseen.draw(n)
        stamp = glyphs.stamp(glyphs.unseen_vendor, concept, round(SIZES[n // len(glyphs)] * SIDE))
        height, width = stamp.shape[:2]
        opaque = stamp[..., 3] == 0
        places = [(y, x) for y in range(SIDE - height + 1) for x in range(SIDE - width + 1)]
        found = [(image[y : y + height, x : x + width][opaque] == stamp[..., :3][opaque]).all() for y, x in places]
        assert sum(found) >= 1


class Watched(dict):
    """Remembers what was looked up."""

    def __init__(self, *items):
        super().__init__(*items)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("split", ["train", "seen", "unseen"])
def test_fonts_of_a_split(glyphs, split):
    watched = Glyphs(Watched(glyphs.images), glyphs.concepts, glyphs.train_vendors, glyphs.unseen_vendor)
    data = BundledClassification(watched, split, 60, side=SIDE)
    for n in range(60):
        data.draw(n)
    assert watched.images.asked == ({glyphs.unseen_vendor} if split == "unseen" else set(glyphs.train_vendors))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_training_images_are_functions_of_seed_epoch_and_index(glyphs):
    data, again = (BundledClassification(glyphs, "train", 50, side=SIDE, seed=1) for _ in range(2))
    other = BundledClassification(glyphs, "train", 50, side=SIDE, seed=2)
    first = [data[n] for n in range(6)]
    assert all(same(item, again[n]) for n, item in reversed(list(enumerate(first))))
    assert not any(torch.equal(item["image"], other[n]["image"]) for n, item in enumerate(first))
    assert not any(torch.equal(item["image"], data[n + 50]["image"]) for n, item in enumerate(first))
    assert [data[n + 50]["label"] for n in range(6)] == [item["label"] for item in first]


def test_test_images_are_the_same_in_every_epoch(glyphs):
    data = BundledClassification(glyphs, "seen", 30, side=SIDE)
    assert all(same(data[n], data[n + 60]) for n in range(5))


def test_images_are_normalised_with_the_statistics_of_imagenet(unseen):
    image, _ = unseen.draw(5)
    mean, std = (torch.tensor(values) for values in IMAGENET)
    levels = (unseen[5]["image"].permute(1, 2, 0) * std + mean) * 255
    torch.testing.assert_close(levels, torch.from_numpy(image).float(), rtol=0, atol=1e-3)


def test_without_strength_a_glyph_is_only_mirrored_resized_and_moved(glyphs):
    source = glyphs.images["twemoji"][20]
    for seed in range(5):
        drawn = warped(source, np.random.default_rng(seed), 72, 0.0)
        rows, columns = (np.flatnonzero((drawn[..., 3] < 128).any(axis)) for axis in (1, 0))
        ratio = (rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1)
        alpha = source[..., 3] > 127
        rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
        assert ratio == pytest.approx((rows[-1] - rows[0] + 1) / (columns[-1] - columns[0] + 1), rel=0.06)
        assert recoloured(drawn, np.random.default_rng(seed), 0.0) is drawn


def test_colours_stay_premultiplied(glyphs):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        stamp = recoloured(warped(glyphs.images["noto"][seed], rng, 72, 1.0), rng, 1.0)
        assert (stamp[..., :3] <= 255 - stamp[..., 3:]).all()


def test_turning_the_hue_keeps_grey_grey():
    grey = np.full((4, 4, 4), 120, np.uint8)
    grey[..., 3] = 0
    for seed in range(20):
        colours = recoloured(grey, np.random.default_rng(seed), 1.0)[..., :3].astype(int)
        assert (np.ptp(colours, axis=-1) <= 1).all()


@pytest.mark.parametrize(("split", "length"), [("train", 0), ("unseen", 5005), ("seen", 0), ("validation", 5)])
def test_what_cannot_be(glyphs, split, length):
    with pytest.raises(ValueError, match="split must be|must be at least 1"):
        BundledClassification(glyphs, split, length, side=SIDE)
