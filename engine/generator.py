"""Which DiT the scripts that draw take, from the command line; needs no torch, so that it is checked at once."""

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.config import load_config
from engine.options import positive_int

BUNDLED = "dit-mini"
SIZES, WEIGHTS = "configs/dit/model_mini.yaml", "data/dit_mini.safetensors"  # of the bundled one
OFFICIAL = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
PIXELS, CLASSES = 256, 1000  # of the published ones


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--ckpt`, `--no-ema`, `--image-size`, `--num-classes`, `--vae`."""
    add = parser.add_argument_group("model").add_argument
    forms = f"{BUNDLED}, DiT-XL/2 (S, B, L, XL / 2, 4, 8), or a YAML file of sizes (default: %(default)s)"
    add("--model", default=BUNDLED, help=forms)
    add("--ckpt", help=f"weights file, or 'random'; default: that of {BUNDLED}; official: {OFFICIAL}")
    add("--no-ema", action="store_true", help="of a checkpoint with both, the last weights, not their moving average")
    add("--image-size", type=positive_int, help=f"pixels, of a published model (default: {PIXELS})")
    add("--num-classes", type=positive_int, help=f"of a published model (default: {CLASSES})")
    add("--vae", help="folder or name on the hub of a VAE that makes images of latents, e.g. stabilityai/sd-vae-ft-ema")


def choose(args: argparse.Namespace, sizes: ModuleType) -> tuple[Any, str | None]:
    """Sizes and weights file (None: random ones) of the model that was asked for.

    sizes: models.dit_sizes, with `Config` and `published`. Raises ValueError or OSError, naming the option.
    """
    of_file = args.model == BUNDLED or args.model.endswith((".yaml", ".yml"))
    for option, value in (("--image-size", args.image_size), ("--num-classes", args.num_classes)):
        if of_file and value:
            raise ValueError(f"{option} is for the published models (DiT-XL/2, ...): leave it out with {args.model}")
    if of_file:
        chosen = load_config(SIZES if args.model == BUNDLED else args.model, sizes.Config)
    else:
        chosen = sizes.published(args.model, args.image_size or PIXELS, args.num_classes or CLASSES)
    weights = args.ckpt or (WEIGHTS if args.model == BUNDLED else None)
    if weights is None:
        raise ValueError(f"--ckpt: give the weights of {args.model}, a file ({OFFICIAL}) or 'random'")
    if weights != "random" and not Path(weights).is_file():
        raise FileNotFoundError(f"--ckpt {weights}: there is no such file")
    if args.vae and chosen.pixels:
        raise ValueError(f"--vae: {args.model} draws images, no latents: leave it out")
    if args.vae and importlib.util.find_spec("diffusers") is None:
        raise ValueError("--vae needs a package that is not installed: pip install diffusers")
    return chosen, None if weights == "random" else weights
