"""Image files become the pictures that they are: levels of grey, formats, sizes, rotation, transparency."""

import ast
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from configs.decoding import MOST_PIXELS, Decoding
from datasets.annotations import load_image
from datasets.collate import Skipped
from datasets.images import FORMATS, decode_image

ROOT = Path(__file__).resolve().parents[2]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHITE = Decoding(transparency="white")


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(content, decoding=None):
    return decode_image(io.BytesIO(content), "x", decoding or Decoding())


def grey(found):
    """The levels of a grey picture, (H, W)."""
    assert isinstance(found, Image.Image), found
    pixels = np.asarray(found).astype(int)
    assert found.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def refused(content, decoding=None):
    found = decoded(content, decoding)
    assert isinstance(found, Skipped) and found.path == "x" and "\n" not in found.reason
    return found.reason


levels16 = st.lists(st.integers(0, 65535), min_size=1, max_size=64).map(lambda v: np.array([v], np.uint16))


@QUICK
@given(levels16, st.sampled_from(["PNG", "TIFF"]))
def test_16_bits_are_scaled_to_8(levels, form):
    found = grey(decoded(encoded(Image.fromarray(levels), form)))
    assert (np.abs(found - levels / 257) <= 0.5).all()


def test_a_ramp_of_16_bits(tmp_path):
    """Each of 128 levels is told from the others; plain white would be one."""
    ramp = np.tile(np.arange(0, 65536, 512, dtype=np.uint16), (16, 1))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    found = grey(load_image(tmp_path / "x.png"))
    assert len(np.unique(found)) == 128 and np.abs(found - (ramp >> 8)).max() <= 1


@QUICK
@given(st.lists(st.integers(0, 255), min_size=1, max_size=64))
def test_a_picture_is_the_same_at_every_depth(values):
    """8 bits widened to 16, to 32, and to floats of both kinds, come back as they were."""
    small = np.array([values], np.uint8)
    wide = small.astype(np.uint16) * 257
    assert (grey(decoded(encoded(Image.fromarray(small)))) == small).all()
    assert (grey(decoded(encoded(Image.fromarray(wide)))) == small).all()
    assert (grey(decoded(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"))) == small).all()
    assert (grey(decoded(encoded(Image.fromarray(small.astype(np.float32) / 255), "TIFF"))) == small).all()
    if small.max() > 1:
        assert (grey(decoded(encoded(Image.fromarray(small.astype(np.float32)), "TIFF"))) == small).all()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.float32([[0, np.nan]]), "NaN or infinite"),
        (np.float32([[0, np.inf]]), "NaN or infinite"),
        (np.float32([[0, 1.02]]), "floats from 0 to 1.02, whose white is not known"),
        (np.float32([[-0.1, 1]]), "floats from -0.1 to 1"),
        (np.float32([[0, 256]]), "floats from 0 to 256"),
        (np.int32([[0, 255]]), "integers from 0 to 255 in words of 32 bits"),
        (np.int32([[-1, 9999]]), "integers from -1 to 9999"),
        (np.int32([[0, 65536]]), "integers from 0 to 65536"),
    ],
)
def test_levels_whose_white_is_not_known_are_named(values, told):
    assert told in refused(encoded(Image.fromarray(values), "TIFF"))


def test_a_tiff_whose_zero_is_white():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    content = encoded(Image.fromarray(ramp), "TIFF")
    tag = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation, one short
    assert content.count(tag) == 1
    inverted = content.replace(tag + b"\1", tag + b"\0")
    assert Image.open(io.BytesIO(inverted)).tag_v2[262] == 0
    assert (grey(decoded(inverted)) == 255 - np.arange(256)).all()


def test_one_transparent_level_of_16_bits():
    content = encoded(Image.fromarray(np.uint16([[0, 512, 65535]])), transparency=512)
    assert grey(decoded(content)).tolist() == [[0, 2, 255]]
    assert grey(decoded(content, WHITE)).tolist() == [[0, 255, 255]]


# Formats


@pytest.mark.parametrize("form", FORMATS)
def test_formats_that_are_read(form):
    image = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8))
    found = np.asarray(decoded(encoded(image, form))).astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found[4, 4] - (200, 100, 50)).max() <= 40  # GIF has a palette


def test_pictures_of_a_phone_that_hold_several():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    found = decoded(encoded(first, "MPO", save_all=True, append_images=[second]))
    assert np.asarray(found)[4, 4, 0] > 200


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_file(tmp_path, monkeypatch):
    """Ghostscript draws EPS, whatever the file is called."""
    for starter in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(f"subprocess.{starter}", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "photo.jpg").write_bytes(EPS)
    found = load_image(tmp_path / "photo.jpg")
    assert found.path.endswith("photo.jpg") and "no image in one of the formats JPEG, PNG" in found.reason


@pytest.mark.parametrize("form", ["PPM", "TGA", "ICO", "PCX", "JPEG2000", "SGI", "PDF"])
def test_other_formats_are_not_read(form):
    assert "no image in one of the formats" in refused(encoded(Image.new("RGB", (16, 16)), form))


@QUICK
@given(st.sampled_from(FORMATS), st.data())
def test_damage_never_raises(form, data):
    content = bytearray(encoded(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)), form))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decoded(bytes(content))
    assert isinstance(found, Skipped) and "\n" not in found.reason or found.mode == "RGB"


@pytest.mark.script
def test_files_are_opened_as_images_in_narrow_formats_only():
    code = [path for folder in ("datasets", "engine", "models", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in (*code, *ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert any(keyword.arg == "formats" for keyword in node.keywords), f"{path}:{node.lineno}"


# Sizes


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 1600))
def test_the_pixel_limit(width, height, most):
    content = encoded(Image.new("1", (width, height)))
    if width * height <= most:
        assert decoded(content, Decoding(max_pixels=most)).size == (width, height)
    else:
        told = refused(content, Decoding(max_pixels=most))
        assert f"{width} x {height} pixels, more than max_pixels = {most}" in told


@pytest.mark.parametrize(("width", "height"), [(9000, 8000), (12000, 9000), (20000, 10000), (65535, 65535)])
def test_decompression_bombs_are_refused_before_they_are_decoded(width, height, monkeypatch):
    small = encoded(Image.new("L", (1, 1)))
    header = small[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    bomb = header + zlib.crc32(header[12:29]).to_bytes(4, "big") + small[33:]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "more than max_pixels = 67108864" in refused(bomb)


@pytest.mark.parametrize("content", [{"transparency": "black"}, {"max_pixels": 0}, {"max_pixels": MOST_PIXELS + 1}])
def test_decodings_that_are_none(content):
    with pytest.raises(ValueError, match=f"{next(iter(content))} must be"):
        Decoding(**content)


# Rotation and transparency


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_rotation_by_option(orientation, form):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(pixels), form, exif=exif)
    as_stored, turned = decoded(content), decoded(content, Decoding(exif_rotation=True))
    assert as_stored.size == (32, 16) and np.asarray(as_stored)[2, 2, 0] > 200
    assert np.array_equal(turned, ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
    assert (turned.size == (16, 32)) == (orientation > 4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("levels", [np.uint8([[0, 255]]), np.uint16([[0, 65535]])], ids=["8 bits", "16 bits"])
def test_a_tiff_is_turned_once(levels, turned):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(levels), "TIFF", exif=exif)
    assert grey(decoded(content, Decoding(exif_rotation=turned))).tolist() == [[0], [255]]


def test_rotation_of_deep_greys():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(np.uint16([[0, 65535]])), exif=exif)
    assert grey(decoded(content, Decoding(exif_rotation=True))).tolist() == [[0], [255]]


@QUICK
@given(st.integers(0, 255), st.integers(0, 255), st.sampled_from(["RGBA", "LA"]))
def test_transparency_on_white_by_option(shade, alpha, mode):
    bands = [Image.new("L", (2, 2), value) for value in [shade] * (len(mode) - 1) + [alpha]]
    content = encoded(Image.merge(mode, bands))
    assert (grey(decoded(content)) == shade).all(), "the colours as they are stored"
    expected = (shade * alpha + 255 * (255 - alpha)) / 255
    assert (np.abs(grey(decoded(content, WHITE)) - expected) <= 1).all()


def test_a_transparent_palette_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    content = encoded(image, "GIF", transparency=1)
    assert np.asarray(decoded(content, WHITE)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert np.asarray(decoded(content)).tolist()[0][0] == [10, 20, 30]


def test_opaque_pictures_are_the_same_on_white():
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
    content = encoded(Image.fromarray(pixels))
    assert np.array_equal(decoded(content), pixels) and np.array_equal(decoded(content, WHITE), pixels)
