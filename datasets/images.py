"""Image files to RGB pictures: the one place where files of the user's are opened as images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from configs.decoding import Decoding
from datasets.collate import Skipped

# Whatever a file is called: others, such as EPS, start programs or are decoders that few people look at.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DEFAULT = Decoding()
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def load_image(path: Path, decoding: Decoding = DEFAULT) -> Image.Image | Skipped:
    """The image as RGB, or why it cannot be read."""
    return decode_image(path, str(path), decoding)


def decode_image(file: Path | BinaryIO, name: str, decoding: Decoding = DEFAULT) -> Image.Image | Skipped:
    """The image in a file as RGB, or why it cannot be read; `name` is what it is listed under.

    Levels of grey of more than 8 bits are scaled to 8: integers so that the largest of their bits is white; floats from
    0 to 1, where 1 is white, and whole floats from 0 to 255. Others, whose white is not known, are not read.
    """
    try:
        with _open(file, decoding) as image:
            image.load()
            return _rgb(image, decoding)
    except Image.UnidentifiedImageError:
        return Skipped(name, f"it is damaged, or no image in one of the formats {', '.join(FORMATS)}")
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        reason = f"{type(error).__name__}: {error}".replace(repr(file), name)  # not an object's address
        return Skipped(name, " ".join(reason.removeprefix("_UnreadableError: ").split()))


class _UnreadableError(Exception):
    """A picture that is not what a picture should be; the message says why."""


def _open(file: Path | BinaryIO, decoding: Decoding) -> Image.Image:
    """The file's header is read, no pixel yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _UnreadableError(f"it has more than max_pixels = {decoding.max_pixels} pixels") from None
    if image.width * image.height > decoding.max_pixels:
        image.close()
        size = f"{image.width} x {image.height}"
        raise _UnreadableError(f"it has {size} pixels, more than max_pixels = {decoding.max_pixels}")
    return image


def _rgb(image: Image.Image, decoding: Decoding) -> Image.Image:
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    found = _scaled(image) if deep else image
    if decoding.exif_rotation:
        found = ImageOps.exif_transpose(found)
    if decoding.transparency == "white" and found.has_transparency_data:
        picture = found.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return found if found.mode == "RGB" else found.convert("RGB")  # which would copy it


def _scaled(image: Image.Image) -> Image.Image:
    """An image of deep greys as one of 8 bits, with the same EXIF data and transparency."""
    levels = np.asarray(image)
    white = _white(image, levels)
    if image.mode == "F":
        shares = levels / white
    else:
        levels = levels.astype(np.int64)
        shares = (levels * 255 + white // 2) // white / 255  # rounded as integers are, not as floats
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow leaves as it is
        shares = 1 - shares
    grey = np.rint(shares * 255).astype(np.uint8)
    transparent = image.info.get("transparency")  # in a PNG: the one level that cannot be seen
    bands = [grey] if transparent is None else [grey, np.where(levels == transparent, 0, 255).astype(np.uint8)]
    scaled = Image.merge("LA"[: len(bands)], [Image.fromarray(band) for band in bands])
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return scaled


def _white(image: Image.Image, levels: np.ndarray) -> int:
    """The level that is white; raises where that is not known."""
    bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    if image.mode != "F" and not (image.mode == "I" and image.format == "TIFF"):
        return 2**bits - 1
    if not np.isfinite(levels).all():
        raise _UnreadableError("it has pixels that are NaN or infinite")
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        if low >= 0 and high <= 1:
            return 1
        if low >= 0 and high <= 255 and (levels == np.floor(levels)).all():
            return 255
        raise _UnreadableError(
            f"its pixels are floats from {low:g} to {high:g}, whose white is not known: expected 0 to 1, or whole "
            "numbers from 0 to 255"
        )
    # Integers of 32 bits, or with a sign, are read as 16 bits in wider words; up to 255 they might be 8 bits.
    if bits == 32 and low >= 0 and (255 < high < 1 << 16 or high == 0):
        return (1 << 16) - 1
    raise _UnreadableError(
        f"its pixels are integers from {low} to {high} in words of {bits} bits, whose white is not known: save it with "
        "8 or 16 bits, unsigned"
    )
