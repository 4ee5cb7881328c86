"""How image files become pictures, as configurations and command lines say it. Needs no torch."""

from dataclasses import dataclass

from sparsity.errors import UserError

GROUNDS = ("ignored", "white")
MOST_PIXELS = 89_478_485  # Pillow's own limit, beyond which it takes a file for a decompression bomb


@dataclass(frozen=True)
class Decoding:
    """exif_rotation: turn an image as its EXIF data says and viewers show it (boxes of regions are of the turned image
    then); by default pixels stay as they are stored, but for TIFF, which Pillow always turns. transparency: "ignored",
    the colours that are stored under it, as Pillow's `convert("RGB")` gives them, or "white", laid on white.
    max_pixels: larger images are not decoded.
    """

    exif_rotation: bool = False
    transparency: str = "ignored"
    max_pixels: int = 1 << 26

    def __post_init__(self):
        if self.transparency not in GROUNDS:
            raise UserError(f"transparency must be one of {', '.join(GROUNDS)}, got {self.transparency!r}")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise UserError(f"max_pixels must be from 1 to {MOST_PIXELS}, got {self.max_pixels!r}")
