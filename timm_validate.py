"""Accuracy of a classifier of timm, dense, with zeros or with learned masks, as JSON.

    python timm_validate.py --model vit_base_patch16_224.augreg_in1k --pretrained
    python timm_validate.py --model vit_base_patch16_224 --checkpoint pruned.pt --sparsity-mode sparse
    python timm_validate.py --model vit_base_patch16_224 --checkpoint model_best.pth.tar --sparsity-mode maskllm
    python timm_validate.py --model vit_mini --pretrained

ImageNet is expected as data/imagenet/val/<class>/*.JPEG; `vit_mini`, the bundled model, has its images here.
`--sparsity-mode sparse` looks for zeros in the checkpoint and says what is there; `maskllm` puts the zeros of learned
masks (`*.gate`, `*.mask`) into the weights. What is said besides the JSON goes to stderr.
"""

import argparse
import json
from pathlib import Path

from configs.sources import IMAGENET, images_of
from engine.launch import launch, run
from engine.options.command_line import Parser, add_device_options, add_reading_options, decoding, positive_int
from sparsity.errors import MissingFileError, UserError
from sparsity.files import weights_files

MODES = ("dense", "sparse", "maskllm")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a name of timm, or vit_mini")
    add("--checkpoint", type=Path, help="weights to evaluate, or a folder of shards (default: none)")
    add("--pretrained", action="store_true", help="evaluate the published weights (default: no)")
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights (default: no)")
    add(
        "--weights-key",
        default="",
        help="key of the checkpoint under which the weights stand (default: the usual ones)",
    )
    add("--sparsity-mode", choices=MODES, default="dense", help="what the checkpoint holds (default: %(default)s)")
    add("--mask", type=Path, help="mask file to apply to the weights (default: none)")
    add("--data-path", help=f"folder with val/, or of classes; cifar10, cifar100 or bundled (default: {IMAGENET})")
    add("--num-classes", type=positive_int, help="default: the model's")
    add("--image-size", "--img-size", type=positive_int, help="side of the images in pixels (default: the model's)")
    add("--batch-size", type=positive_int, default=128, help="images at a time (default: %(default)s)")
    add_reading_options(parser)
    add_device_options(parser)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Everything that can be refused before heavy imports."""
    args.data_path, args.decoding = args.data_path or images_of(args.model), decoding(args)
    if bool(args.checkpoint) == args.pretrained:
        raise UserError("give --checkpoint FILE, or --pretrained for the published weights, and not both")
    if args.weights_key and (args.use_ema or not args.checkpoint):
        raise UserError(
            f"--weights-key {args.weights_key}: is a key of --checkpoint FILE, and takes the place of --use-ema"
        )
    if args.pretrained and args.sparsity_mode != "dense":
        raise UserError(f"--sparsity-mode {args.sparsity_mode} needs --checkpoint: the published weights are dense")
    for option in ("checkpoint", "mask"):
        path = vars(args)[option]
        if path and not weights_files(path):
            raise MissingFileError(f"--{option} {path}: there is no such file")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check(args)

    from datasets.calibration.data_kinds import clear_skipped
    from datasets.labelled.data_path import check_data, open_data
    from datasets.labelled.public import check_classes
    from engine.evaluation.classification import Accuracy, Classifier
    from engine.evaluation.sparse_checkpoint import loaded, result, tell_zeros
    from engine.ranks import place_of
    from engine.updated_weights import warn_of_updates
    from models.external import timm_classifier as classifiers
    from models.external.model import prunable_view
    from sparsity.masks import Masks

    check_data(args.data_path)
    sizes = {"num_classes": args.num_classes, "image_size": args.image_size}
    model = classifiers.build(args.model, pretrained=args.pretrained, way_out="give --checkpoint FILE", **sizes)
    gates = 0
    if args.checkpoint:
        weights = classifiers.read(args.checkpoint, ema=args.use_ema, key=args.weights_key)
        weights, gates = loaded(weights, args.sparsity_mode, str(args.checkpoint))
        classifiers.load(model, args.checkpoint, weights)
    view = prunable_view(model)
    if args.mask:
        masks = Masks.load(args.mask)
        warn_of_updates(masks, view, args.mask)
        masks.apply(view)
    if args.sparsity_mode != "dense" or args.mask:
        tell_zeros(view, str(args.checkpoint or args.mask))
    images = classifiers.data_config(model, args.image_size)
    fabric, folder = launch(args), Path("output")
    clear_skipped(folder, place_of(fabric))
    how = {"side": images["input_size"][-1], "decoding": args.decoding}
    test = open_data(args.data_path, False, classifiers.transform(images), **how)
    check_classes(len(test.class_names), model.num_classes)
    reading = {"workers": args.workers, "max_skipped": args.max_skipped, "batch_size": args.batch_size}
    accuracy = Accuracy(Classifier(model.to(fabric.device)), test, fabric, folder, **reading)()
    if fabric.is_global_zero:
        print(json.dumps(result(args.model, accuracy, model, gates, images), indent=4))
    fabric.barrier()


if __name__ == "__main__":
    run(main)
