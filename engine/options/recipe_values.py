"""Values of a recipe as options: they take the place of the configuration's, see `configs.task.TaskConfig`."""

import argparse
import os
from collections.abc import Callable, Collection
from dataclasses import fields

from configs.foreign import PUBLISHED, Augmentation
from configs.task import SCHEDULES
from engine.options.command_line import count, positive_float, positive_int, share
from engine.options.external import keywords
from sparsity.errors import UserError

LEFT = "default: the configuration's"


def add_recipe_options(parser: argparse.ArgumentParser, *, tests: bool = False) -> None:
    """Add the rate, the epochs and the sizes of batches and images. tests: whether there is a batch of tests."""
    add = parser.add_argument_group(f"data and training; {LEFT}").add_argument
    add("--image_size", type=positive_int, help=f"side of the images in pixels; {LEFT}")
    batch = "samples in a step, of all devices together"
    add("--batch_size", type=positive_int, help=f"{batch}; {LEFT}")
    parts = "samples at a time on each device, which sums their gradients up; default: all of a step, or at most the"
    add("--batch_size_train", type=positive_int, help=f"{parts} configuration's without --batch_size")
    if tests:
        add("--batch_size_test", type=positive_int, help=f"images at a time in evaluation; {LEFT}")
    add("--epochs", type=count, help=LEFT)
    add("--lr", type=positive_float, help=f"peak learning rate; {LEFT}")
    add("--weight_decay", type=float, help=LEFT)
    add("--optimizer", dest="optimizer_name", metavar="NAME", help=f"adamW, sgd; of models of timm any of timm; {LEFT}")
    add("--workers", type=count, help=f"processes of each device that read; {LEFT}")
    add("--warmup_frac", type=share, help=f"share of all steps in which the rate rises; {LEFT}")
    add("--sched_type", choices=SCHEDULES, help=f"how the rate falls after that; {LEFT}")


def add_classification_options(parser: argparse.ArgumentParser, words: Collection[str]) -> None:
    """Add the images that are classified, and what classifiers of timm and transformers have besides.

    words: data that has a name.
    """
    add = parser.add_argument_group("images").add_argument
    folder = "a folder with train/ and val/ of class folders, or one of class folders, or of images with --distill 1"
    usual = "default of the bundled model: bundled"
    add("--dataset", type=_dataset(words), metavar="DATA", help=f"{', '.join(words)}; or {folder}; {usual}")
    held = "share of each class that is held out of a folder without val/, the same images in all runs (default: 0.2)"
    add("--val_fraction", type=share, help=held)
    add("--smoothing", type=share, help=f"of labels; {LEFT}")
    add_foreign_options(parser)
    add = parser.add_argument_group(f"classifiers of timm and transformers; {LEFT}").add_argument
    by_number = "the classes of the weights, which have no names, are those of the data in their order (default: no)"
    add("--keep_head", action="store_true", default=None, help=by_number)
    add("--model_kwargs", type=keywords, help=f"timm: further arguments of the model, name=value,...; {LEFT}")
    add("--aa", help=f"AutoAugment policy, as rand-m8-inc1-mstd101; {LEFT}")
    add("--reprob", type=share, help=f"share of images with random erasing; {LEFT}")
    add("--remode", choices=("pixel", "const", "rand"), help=f"what is put there; {LEFT}")
    add("--hflip", type=share, help=f"share of mirrored images; {LEFT}")
    add("--color_jitter", type=float, help=LEFT)
    add("--scale", type=float, nargs=2, help=f"share of an image that a crop keeps; {LEFT}")
    add("--ratio", type=float, nargs=2, help=f"of the sides of a crop; {LEFT}")
    add("--mixup", type=float, help=f"alpha; {LEFT}")
    add("--cutmix", type=float, help=f"alpha; {LEFT}")
    add("--mixup_prob", type=share, help=f"share of batches with either; {LEFT}")
    add("--drop_path", type=share, help=f"rate of stochastic depth, of timm; {LEFT}")


def _dataset(words: Collection[str]) -> Callable[[str], str]:
    """Return the argparse type of a word, or of a folder that is there."""

    def parse(text: str) -> str:
        if "nlvr" in text.lower():
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}: NLVR2 asks about two images, not for classes")
        if text not in words and not os.path.isdir(text):  # False, too, for what can be no path
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}: neither {', '.join(words)} nor a folder")
        return text

    return parse


def add_foreign_options(parser: argparse.ArgumentParser) -> None:
    """Add where the weights of models of other libraries are from."""
    add = parser.add_argument_group("weights of models of timm and transformers").add_argument
    ones = "begin with the weights that the library has for the name (default: yes, unless --weights is given)"
    add("--pretrained", dest="weights", action="store_const", const=PUBLISHED, help=ones)
    keys = "key of --weights FILE under which they stand, e.g. state_dict_ema (default: as the library reads it)"
    add("--weights_key", help=keys)


def check_classification(args: argparse.Namespace, foreign: bool) -> None:
    """Raise UserError for options of classifiers of timm and transformers with another model, and of timm with
    transformers'.
    """
    augmentation = {field.name for field in fields(Augmentation)}
    only = {"image_size", "drop_path", "model_kwargs"} if args.model.startswith("hf:") else set()
    only |= set() if foreign else {"weights_key", "keep_head", "model_kwargs", *augmentation}
    whose = "timm" if foreign else "timm and transformers"
    for option in sorted(only):
        if vars(args)[option] is not None:
            raise UserError(f"--{option} is for models of {whose}: leave it out with {args.model}")
    if args.weights == PUBLISHED and not foreign:
        raise UserError(f"--pretrained is for models of timm and transformers: leave it out with {args.model}")
