"""Which DiT the scripts that draw take, from the command line; needs no torch, so that it is checked at once."""

import argparse
import importlib.util
import shutil
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from configs.loading import load_config
from configs.locations import located
from engine.options.command_line import positive_int
from sparsity.errors import MissingFileError, ResourceError, UserError
from sparsity.files import replacing

BUNDLED = "dit-mini"
SIZES, WEIGHTS = "configs/dit/model_mini.yaml", "data/dit_mini.safetensors"  # of the bundled one
OFFICIAL = {("DiT-XL/2", side): f"DiT-XL-2-{side}x{side}.pt" for side in (256, 512)}  # (model, pixels) -> file
SITE, DOWNLOADED = "https://dl.fbaipublicfiles.com/DiT/models/", Path("pretrained_models")
_PATIENCE = 30  # seconds without an answer
PIXELS, CLASSES = 256, 1000  # of the published ones


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--ckpt`, `--no-ema`, `--image-size`, `--num-classes`, `--vae`."""
    add = parser.add_argument_group("model").add_argument
    forms = f"{BUNDLED}, DiT-XL/2 (S, B, L, XL / 2, 4, 8), or a YAML file of sizes (default: %(default)s)"
    add("--model", default=BUNDLED, help=forms)
    published = f"the official ones of {' and '.join(OFFICIAL.values())}, downloaded once to {DOWNLOADED}/"
    add("--ckpt", help=f"weights file, or 'random'; default: those of {BUNDLED}, or {published}")
    last = "take the last weights of a checkpoint, not their moving average (default: no)"
    add("--no-ema", action="store_true", help=last)
    add("--image-size", type=positive_int, help=f"pixels, of a published model (default: {PIXELS})")
    add("--num-classes", type=positive_int, help=f"of a published model (default: {CLASSES})")
    vae = "folder or name on the hub of a VAE that makes images of latents, e.g. stabilityai/sd-vae-ft-ema"
    add("--vae", help=f"{vae} (default: none, latents are saved)")


def choose(args: argparse.Namespace, sizes: ModuleType) -> tuple[Any, str | None]:
    """Sizes and weights file (None: random ones) of the model that was asked for.

    sizes: models.dit.sizes, with `Config` and `published`. Raises UserError or OSError, naming the option.
    """
    of_file = args.model == BUNDLED or args.model.endswith((".yaml", ".yml"))
    for option, value in (("--image-size", args.image_size), ("--num-classes", args.num_classes)):
        if of_file and value:
            raise UserError(f"{option} is for the published models (DiT-XL/2, ...): leave it out with {args.model}")
    if of_file:
        chosen = load_config(SIZES if args.model == BUNDLED else args.model, sizes.Config)
    else:
        chosen = sizes.published(args.model, args.image_size or PIXELS, args.num_classes or CLASSES)
    if args.vae and chosen.pixels:
        raise UserError(f"--vae: {args.model} draws images, no latents: leave it out")
    if args.vae and importlib.util.find_spec("diffusers") is None:
        raise UserError("--vae needs a package that is not installed: pip install diffusers")
    weights = args.ckpt or (
        located(WEIGHTS) if args.model == BUNDLED else official(args.model, args.image_size or PIXELS)
    )
    if weights != "random" and not Path(weights).is_file():
        raise MissingFileError(f"--ckpt {weights}: there is no such file")
    return chosen, None if weights == "random" else weights


def official(model: str, pixels: int) -> str:
    """The file of the published weights, which is downloaded where it is not there yet, whole or not at all.

    Raises UserError where none were published for so many pixels, or they cannot be had.
    """
    if (model, pixels) not in OFFICIAL:
        raise UserError(f"--ckpt: give the weights of {model} for {pixels} pixels, a file, or 'random'")
    path = DOWNLOADED / OFFICIAL[model, pixels]
    if not path.is_file():
        url = SITE + path.name
        try:
            with urllib.request.urlopen(url, timeout=_PATIENCE) as answer, replacing(path) as temporary:
                size = int(answer.headers["Content-Length"])
                bar = tqdm.wrapattr(answer, "read", total=size, desc=path.name, leave=False)
                with bar as content, temporary.open("wb") as file:
                    shutil.copyfileobj(content, file)
                if temporary.stat().st_size != size:
                    raise OSError("the connection broke off")
        except ResourceError:
            raise
        except (OSError, ValueError, TypeError) as error:
            told = f"{url} cannot be downloaded ({error}); give the weights of {model}, a file, or 'random'"
            raise UserError(f"--ckpt: {told}") from error
    return str(path)
