"""Prune a classifier of timm, to N:M or any sparsity, without training.

    python oneshot_pruning_timm.py --model vit_base_patch16_224.augreg_in1k --pruner sparsegpt --enable-update
    python oneshot_pruning_timm.py --model vit_base_patch16_224.augreg_in1k --pruner wanda --save-model pruned.pt
    python oneshot_pruning_timm.py --model vit_mini --pruner magnitude --N 1 --M 4
    python oneshot_pruning_timm.py --model vit_mini --pruner sparsegpt --enable-update --sparsity 60

ImageNet is expected as data/imagenet/{train,val}/<class>/*.JPEG; `vit_mini`, the bundled model, has its images here.
Calibration reads training images alone; accuracy is that on the others. --save-model writes a state dict that timm
loads with no code of ours, with zeros where weights are gone, and the masks beside it.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pruners
from configs.decoding import Decoding
from configs.sources import IMAGENET, images_of
from engine.launch import launch, run
from engine.options.command_line import Parser, add_device_options, add_reading_options, decoding, positive_int
from engine.options.oneshot import PRUNERS, add_oneshot_options, check_oneshot, plan_of
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable, weights_files

SUFFIXES = (".pth.tar", ".pt", ".pth", ".safetensors")
WAY_OUT = "give --ckpt FILE, a checkpoint of this model"


@dataclass(frozen=True)
class Asked:
    """All that decides what calibration reads."""

    model: str
    data_path: str
    nsamples: int
    batch_size: int
    image_size: int | None
    decoding: Decoding


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--model", default="vit_base_patch16_224.augreg_in1k", help="a name of timm, or vit_mini (default: %(default)s)"
    )
    add_oneshot_options(parser, nsamples=128)
    add("--data-path", help=f"folder with train/ and val/, cifar10, cifar100 or bundled (default: {IMAGENET})")
    add("--batch-size", type=positive_int, default=32, help="images at a time (default: %(default)s)")
    add("--ckpt", type=Path, help="weights instead of the published ones (default: none)")
    add("--weights-key", default="", help="key of --ckpt under which they stand (default: averaged ones before others)")
    add("--skip-eval", action="store_true", help="prune only, and measure no accuracy (default: no)")
    add("--num-classes", type=positive_int, help="default: the model's")
    add("--image-size", "--img-size", type=positive_int, help="side of the images in pixels (default: the model's)")
    add_reading_options(parser)
    add_device_options(parser)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before heavy imports."""
    args.target, args.decoding = check_oneshot(args), decoding(args)
    if args.ckpt and not weights_files(args.ckpt):
        raise MissingFileError(f"--ckpt {args.ckpt}: there is no such file")
    if args.weights_key and not args.ckpt:
        raise UserError(f"--weights-key {args.weights_key}: is a key of --ckpt FILE, which is not given")
    if args.save_model:
        if not args.save_model.name.endswith(SUFFIXES):
            raise UserError(f"--save-model {args.save_model}: its name must end with {', '.join(SUFFIXES)}")
        check_writable(args.save_model.parent, "--save-model")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)

    from datasets.calibration.data_kinds import clear_skipped
    from datasets.calibration.image_batches import Samples
    from datasets.labelled.data_path import check_data, has_validation, open_data
    from datasets.labelled.public import check_classes
    from engine.evaluation.classification import Accuracy, Classifier
    from engine.pruning.oneshot import one_shot, preflight, report, save
    from engine.ranks import place_of
    from models.external import timm_classifier as classifiers
    from models.external.model import prunable_view

    if args.data_path:
        check_data(args.data_path)
    args.data_path = args.data_path or images_of(args.model)
    sizes = {"num_classes": args.num_classes, "image_size": args.image_size}
    model = classifiers.build(args.model, pretrained=args.ckpt is None, way_out=WAY_OUT, **sizes)
    halves = classifiers.load(model, args.ckpt, key=args.weights_key) if args.ckpt else {}
    images = classifiers.data_config(model, args.image_size)
    fabric, folder = launch(args), args.save_model.parent if args.save_model else Path("output")
    clear_skipped(folder, place_of(fabric))
    view = prunable_view(model.to(fabric.device))
    how = {"transform": classifiers.transform(images), "side": images["input_size"][-1], "decoding": args.decoding}
    opened = partial(open_data, args.data_path, **how)
    reading = {"workers": args.workers, "max_skipped": args.max_skipped}

    accuracy = None
    if has_validation(args.data_path) and not args.skip_eval:
        test = opened(train=False)
        check_classes(len(test.class_names), model.num_classes)
        accuracy = Accuracy(Classifier(model), test, fabric, folder, **reading)
    lines = [("dense", accuracy() if accuracy else {})]
    masks, name = None, PRUNERS[args.pruner]
    if name:
        pruner = pruners.build(name, **plan_of(args, args.target))
        preflight(pruner, view, args.target, args.seed, args.devices)
        data = None
        if pruner.plan.statistics:
            train = opened(train=True, length=args.nsamples, seed=args.seed)
            reading |= {"seed": args.seed, "place": place_of(fabric)}
            data = Samples(train, args.nsamples, args.batch_size, folder, **reading)
        asked = Asked(args.model, args.data_path, args.nsamples, args.batch_size, args.image_size, args.decoding)
        kept = {"folder": args.save_model.parent, "config": asked} if args.save_model else {}
        masks = one_shot(pruner, view, data, fabric, args.target, args.seed, **kept)
        masks.apply(view)
        lines.append((f"{args.pruner} {args.target}", accuracy() if accuracy else {}))
    if fabric.is_global_zero:
        written = save(model, args.save_model, masks, halves) if args.save_model else []
        print(report(lines, view, written))
    fabric.barrier()


if __name__ == "__main__":
    run(main)
