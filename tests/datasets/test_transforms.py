import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datasets.transforms import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET,
    OPERATIONS,
    EvalTransform,
    RandAugment,
    RegionTransform,
    TrainTransform,
    box_attention,
    random_crop,
    resize,
    to_tensor,
)


def picture(size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(50, 40), (17, 90), (200, 300), (480, 360)])
@pytest.mark.parametrize("side", [24, 224])
def test_resize_is_pillows_up_to_its_rounding(size, side):
    image = picture((9, 7)).resize(size, Image.Resampling.BICUBIC)
    theirs = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    ours = resize(image, side).numpy()
    assert ours.dtype == np.uint8 and ours.shape == (3, side, side)
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_evaluation_is_a_resize_normalised_as_torchvision_does():
    image = picture()
    for statistics in (CLIP, IMAGENET):
        theirs = v2.functional.to_dtype(resize(image, 24), torch.float32, scale=True)
        theirs = v2.functional.normalize(theirs, *map(list, statistics))
        assert EvalTransform(24, statistics)(image).equal(theirs)
        assert to_tensor(Image.fromarray(resize(image, 24).permute(1, 2, 0).numpy()), statistics).equal(theirs)


def test_the_generator_decides_and_nothing_else():
    transform, image = TrainTransform(24), picture()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = transform(image, np.random.default_rng(1))
    torch.manual_seed(99)
    np.random.seed(99)
    assert transform(image, np.random.default_rng(1)).equal(first)
    assert not transform(image, np.random.default_rng(2)).equal(first)
    assert first.shape == (3, 24, 24) and first.dtype == torch.float32
    torch.manual_seed(0)
    transform(image, np.random.default_rng(1))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("size", [(50, 40), (400, 10), (10, 400), (1, 1)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.5, 1.0)])
def test_random_crop_stays_inside_with_legal_area(size, scale):
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop(size, scale, rng) for _ in range(300)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 1).all()
    if size == (50, 40):
        share = sides.prod(1) / 2000
        assert scale[0] - 0.03 < share.min() and share.max() > 0.8
        assert len(np.unique(boxes[:, 0])) > 10


def test_half_of_the_images_are_flipped():
    dark_left = np.zeros((16, 16, 3), dtype=np.uint8)
    dark_left[:, 8:] = 255
    image = Image.fromarray(dark_left)
    no_augment = RandAugment(num_ops=0)
    rng = np.random.default_rng(0)

    def share(transform):
        return np.mean([(lambda x: x[..., :4].mean() > x[..., -4:].mean())(transform(image, rng)) for _ in range(300)])

    whole = (1.0, 1.0)
    assert share(TrainTransform(16, whole, flip=False, augment=no_augment)) == 0
    assert 0.4 < share(TrainTransform(16, whole, augment=no_augment)) < 0.6


def test_operations_of_randaugment():
    assert list(OPERATIONS) == [
        *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"),
        *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    ]
    image = picture((224, 224))
    for name, operation in OPERATIONS.items():
        out = operation(image, 0.7, 1)
        assert out.size == image.size and out.mode == "RGB"
        assert (out.tobytes() == image.tobytes()) == (name in ("Identity", "AutoContrast")), name
    pixels = np.asarray(image).astype(int)
    brighter = np.asarray(OPERATIONS["Brightness"](image, 0.7, 1)).astype(int)
    assert np.abs(brighter - (pixels * 1.36).clip(0, 255)).max() <= 1
    for name, moved in (("TranslateX", lambda p: p[:, 7:]), ("TranslateY", lambda p: p[7:])):
        there = moved(np.asarray(OPERATIONS[name](image, 0.7, 1)))
        assert (there == (pixels[:, :-7] if name == "TranslateX" else pixels[:-7])).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_geometric_operations_are_bilinear_affine_maps(sign):
    """torchvision's, but for what lies where a pixel meets the grey that was uncovered."""
    image = picture((25, 20)).resize((224, 200), Image.Resampling.BICUBIC)
    degrees = math.degrees(math.atan(0.3 * 0.7)) * sign
    maps = {"ShearX": (0, (degrees, 0.0)), "ShearY": (0, (0.0, degrees)), "Rotate": (30 * 0.7 * sign, (0.0, 0.0))}
    for name, (angle, shear) in maps.items():
        options = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": [128] * 3}
        theirs = np.asarray(v2.functional.affine(image, angle, [0, 0], 1.0, list(shear), **options)).astype(int)
        apart = np.abs(np.asarray(OPERATIONS[name](image, 0.7, sign)) - theirs).max(2)
        assert (apart > 2).sum() <= 2 * 224, name


def test_randaugment_keeps_the_image_without_operations():
    image = picture()
    for idle in (RandAugment(num_ops=0), RandAugment(prob=0.0)):
        assert idle(image, np.random.default_rng(0)).tobytes() == image.tobytes()
    changed = [RandAugment(2, 7)(image, np.random.default_rng(i)).tobytes() != image.tobytes() for i in range(100)]
    assert 0.4 < np.mean(changed) < 0.9


def marked(size, box):
    """A black image, white inside the box x, y, w, h."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("flip", [True, False])
def test_boxes_go_along_with_the_image(flip):
    box = (10, 20, 30, 16)
    image, transform = marked((80, 60), box), RegionTransform(96)
    for seed in range(30):
        out, boxes, kept = transform(image, np.array([box], float), np.random.default_rng(seed), flip)
        assert kept.tolist() == [True]  # the chosen box is always inside
        cx, cy, w, h = boxes[0]
        assert 0 <= cx - w / 2 <= cx + w / 2 <= 1 + 1e-9 and 0 <= cy - h / 2 <= cy + h / 2 <= 1 + 1e-9
        white = (out[0] > out[0].max() - 1).nonzero().float() + 0.5  # centres of white pixels, (y, x)
        centre, extent = white.mean(0) / 96, (white.amax(0) - white.amin(0) + 1) / 96
        assert torch.allclose(centre, torch.tensor([cy, cx]).float(), atol=0.02)
        assert torch.allclose(extent, torch.tensor([h, w]).float(), atol=0.04)


def test_boxes_more_than_half_inside_are_kept():
    boxes = np.array([[30, 30, 10, 10], [0, 0, 60, 60], [0, 0, 4, 4]], float)
    image, transform = picture((60, 60)), RegionTransform(32)
    seen = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        left, top, right, bottom = transform._crop(image.size, boxes, rng)
        _, moved, kept = transform(image, boxes, np.random.default_rng(seed), flip=False)
        for (x, y, w, h), (_, _, mw, mh), keep in zip(boxes, moved, kept, strict=True):
            pixels = np.zeros((60, 60), bool)
            pixels[int(y) : int(y + h), int(x) : int(x + w)] = True
            inside = pixels[top:bottom, left:right].sum()
            assert keep == (inside > 0.5 * w * h)
            assert mw * (right - left) * mh * (bottom - top) == pytest.approx(inside)
        seen.add(tuple(kept.tolist()))
    assert (True, False, False) in seen and (True, True, True) in seen


def test_an_image_without_boxes_is_not_cropped():
    image = picture((20, 10))
    out, boxes, kept = RegionTransform(8)(image, np.zeros((0, 4)), np.random.default_rng(0), flip=False)
    assert out.equal(EvalTransform(8)(image)) and boxes.shape == (0, 4) and kept.shape == (0,)


@pytest.mark.parametrize(
    ("box", "patches"),  # of a grid of 4, row by row
    [
        ((0.5, 0.5, 1.0, 1.0), range(16)),
        ((0.125, 0.125, 0.25, 0.25), [0]),
        ((0.5, 0.5, 0.5, 0.5), [5, 6, 9, 10]),
        ((0.25, 0.125, 0.02, 0.02), [0, 1]),
        ((0.999, 0.999, 0.001, 0.001), [15]),
        ((0.6, 0.1, 0.0, 0.0), [2]),
    ],
)
def test_box_attention(box, patches):
    atts = box_attention(np.array([box]), 4)
    assert atts.shape == (1, 17) and atts.dtype == torch.int64
    assert atts[0].nonzero().flatten().tolist() == [0, *(1 + p for p in patches)]


def test_box_attention_is_the_union_of_touched_patches():
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.01, 0.6, (50, 2))
    boxes = np.concatenate((rng.uniform(sides / 2, 1 - sides / 2), sides), axis=1)
    for grid in (3, 7):
        for (cx, cy, w, h), atts in zip(boxes, box_attention(boxes, grid)[:, 1:], strict=True):
            naive = [
                cx - w / 2 < (i + 1) / grid
                and cx + w / 2 > i / grid
                and cy - h / 2 < (j + 1) / grid
                and cy + h / 2 > j / grid
                for j in range(grid)
                for i in range(grid)
            ]
            assert atts.tolist() == [int(touched) for touched in naive]


def test_to_tensor_normalises():
    grey = Image.fromarray(np.full((2, 2, 3), 128, dtype=np.uint8))
    expected = (128 / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert torch.allclose(to_tensor(grey)[:, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrainTransform(0), "image_res"),
        (lambda: TrainTransform(8, scale=(0.9, 0.1)), "scale"),
        (lambda: RandAugment(level=11), "level"),
        (lambda: RegionTransform(8, min_inside=1), "min_inside"),
    ],
)
def test_bad_arguments_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
