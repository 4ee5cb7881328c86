"""Sizes of DiT (arXiv 2212.09748), published and others. Needs no torch, so that a command line is checked at once."""

from dataclasses import dataclass

from models.parts.sizes import check_sizes
from sparsity.errors import UserError

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("noise", "velocity")
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, layers, heads
PATCHES = (2, 4, 8)
LATENT = 8  # pixels of an image for one of its latents, on each side
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Config:
    """Sizes and diffusion; the defaults are DiT-XL/2 for images of 256 x 256 pixels.

    image_size: of latents or pixels. learn_sigma: the variance is predicted, too. pixels: samples are images in
    [-1, 1]; else they are latents, of which a VAE makes images. class_dropout: share of labels that training replaces
    by the null class; 0: there is none. schedule, prediction: see models/dit/diffusion.py.
    """

    image_size: int = 32
    patch_size: int = 2
    channels: int = LATENT_CHANNELS
    width: int = 1152
    layers: int = 28
    heads: int = 16
    classes: int = 1000
    learn_sigma: bool = True
    pixels: bool = False
    class_dropout: float = 0.1
    schedule: str = "linear"
    prediction: str = "noise"

    def __post_init__(self):
        check_sizes(self)
        if self.width % (4 * self.heads):
            raise UserError(f"width must be a multiple of 4 x heads = {4 * self.heads}, got {self.width!r}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size!r}")
        if self.class_dropout > 1:
            raise UserError(f"class_dropout must be a fraction between 0 and 1, got {self.class_dropout!r}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of a sample: (C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def null_class(self) -> int | None:
        """The label of samples without one."""
        return self.classes if self.class_dropout else None


def names() -> tuple[str, ...]:
    """The published sizes: DiT-XL/2 and so on."""
    return tuple(f"DiT-{size}/{patch}" for size in SIZES for patch in PATCHES)


def published(name: str, image_size: int = 256, classes: int = 1000) -> Config:
    """Sizes of DiT-XL/2, ... for images of `image_size` pixels. UserError where there is no such model."""
    if name not in names():
        raise UserError(f"there is no model {name!r}; there are {', '.join(names())}")
    size, patch = name.removeprefix("DiT-").split("/")
    if image_size % (LATENT * int(patch)):
        raise UserError(f"the image size of {name} must be a multiple of {LATENT * int(patch)}, got {image_size!r}")
    width, layers, heads = SIZES[size]
    sizes = {"image_size": image_size // LATENT, "patch_size": int(patch), "classes": classes}
    return Config(width=width, layers=layers, heads=heads, **sizes)
