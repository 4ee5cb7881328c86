"""Options of a model that is not the project's own; needs no torch."""

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from configs.pruning import DTYPES, TOKENS
from engine.options.command_line import globs, positive_int
from sparsity.errors import UserError

# Options of models that are not the project's own.
EXTERNAL = ("include", "exclude", "groups", "weights_key", "calibration", "class_map", "loss")
EXTERNAL += ("dtype", "img_size", "model_kwargs", "max_tokens", "calibrate_on", "evaluation", "push_to_hub")


def group_globs(text: str) -> dict[str, list[str]]:
    """argparse type: comma separated name=glob; a name that is given again has more globs."""
    groups: dict[str, list[str]] = {}
    for item in text.split(","):
        name, _, glob = (part.strip() for part in item.partition("="))
        if not (name and glob):
            raise argparse.ArgumentTypeError(f"expected name=glob,name=glob, got {item!r} in {text!r}")
        groups.setdefault(name, []).append(glob)
    return groups


def keywords(text: str) -> dict[str, Any]:
    """argparse type: comma separated name=value, where a value is what YAML reads."""
    found: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if not (name.isidentifier() and value):
            raise argparse.ArgumentTypeError(f"expected name=value,name=value, got {item!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise argparse.ArgumentTypeError(f"{name}: expected a number or a text, got {value!r}") from None
    return found


def add_external_options(
    parser: argparse.ArgumentParser, forms: str, *, trains: bool = False, evaluates: bool = False
) -> None:
    """Add what a model that is not the project's own can be told, named as the keys of its configuration.

    forms: how such a model is given. trains: whether the script trains, in float32. evaluates: whether it always
    evaluates.
    """
    add = parser.add_argument_group(f"any other model ({forms})").add_argument
    named = "globs over names of layers, or re: with a regular expression"
    add("--include", type=globs, help=f"{named}: prune these alone (default: all linear layers but the head)")
    add("--exclude", type=globs, help=f"{named}: keep these dense (default: none)")
    add("--groups", type=group_globs, help="name=glob,name=glob: its towers (default: guessed from names of layers)")
    keys = "key of --weights FILE under which they stand, e.g. state_dict_ema (default: as the library reads it)"
    add("--weights_key", help=keys)
    data = "images (captions: captions.json in it, {image: caption}, or 1.txt beside 1.jpg; classes: its folders)"
    own = "package.module:function that returns batches"
    folder = f"folder of {data}, or of sounds (.wav, .flac; captions likewise)"
    add("--calibration", help=f"{folder}; file of texts, .txt or .jsonl; or {own} (default: none)")
    add("--max_tokens", type=positive_int, help="tokens of a row of texts (default: the model's, at most 2048)")
    tokens = "tokens of a language model that are counted: all, those of the text, or those of the images"
    add("--calibrate_on", choices=TOKENS, help=f"{tokens} (default: all)")
    add("--class_map", help="JSON file, {folder of images: class} (default: folders are named as the model's classes)")
    add("--loss", help="package.module:function of (model, batch) (default: the model's own loss)")
    add("--batch_size", type=positive_int, help="images in a batch (default: the configuration's, 8)")
    if trains:
        return
    if evaluates:
        parser.set_defaults(evaluate=True)
    else:
        hub = "owner/name, to which -PRUNER-SPARSITY is added: upload each model of --save_model, private (default: no)"
        add("--push_to_hub", metavar="REPOSITORY", help=hub)
    add("--evaluation", help="data of --evaluate, as --calibration (default: one in 8 of its items, held out)")
    add("--dtype", choices=DTYPES, help="what the model computes in; auto: as its weights are (default: auto)")
    add("--img_size", type=positive_int, help="timm: side of the images in pixels (default: the model's)")
    add("--model_kwargs", type=keywords, help="timm: further arguments of the model, name=value,... (default: none)")


def check_external(args: argparse.Namespace, external: bool, names: Sequence[str], forms: str) -> None:
    """Raise UserError where an option of our models (`names`) is given with another (`forms`), or the other
    way round.
    """
    for option in EXTERNAL:
        if not external and vars(args).get(option) is not None:
            raise UserError(f"--{option} is for other models ({forms}): leave it out with {args.model}")
    if vars(args).get("push_to_hub"):
        if not args.save_model:
            raise UserError("--push_to_hub uploads what --save_model writes: give both")
        _check_token()
    if external and args.variant != "auto":
        raise UserError(f"--variant is for {', '.join(names)}: leave it out with {args.model}")


def _check_token() -> None:
    """Raise UserError where nothing can be uploaded: there is no token."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("--push_to_hub: there is no token: run `hf auth login`, or set HF_TOKEN")
