"""Learn N:M masks end to end: MaskLLM (arXiv 2409.17481), for classifiers and for every other model of this project.

    python maskllm_train.py --model vit_mini --pretrained --preset vit-1epoch --epochs 1
    python maskllm_train.py --model vit_mini --pretrained --sparse-checkpoint PRIOR --schedule-unit step --mask-only
    python maskllm_train.py --model vit_base_patch16_224.augreg_in1k --pretrained --data-dir data/imagenet --mask-only
    python maskllm_train.py --model xvlm --preset llm --sparse-checkpoint PRIOR --mask-only --num_batches 500

PRIOR is a mask file of prune.py, or a checkpoint with zeros of oneshot_pruning_timm.py; --prior-weights takes what a
pruner made of the kept weights. <output>/<experiment>/ gets model_best.pth.tar (timm's layout, with gates),
mask.safetensors, and model.safetensors, which timm loads by itself. The same command goes on after a stop.
scripts/maskllm.sh has whole recipes.
"""

import argparse
import shlex
import sys
from typing import Any

import models
from configs.loading import configure
from configs.pruning import PRUNE_CONFIGS
from configs.sources import images_of
from engine.launch import launch, run, script
from engine.options.command_line import (
    Parser,
    add_config_options,
    add_device_options,
)
from engine.options.external import add_external_options, check_external
from engine.options.mask_learning import (
    add_learning_options,
    add_training_options,
    check_learning,
    check_undecoded,
    fill_from_preset,
    image_settings,
)
from sparsity.errors import UserError
from sparsity.learned.schedule import RECIPES, Recipe

WAY_OUT = "give --initial-checkpoint FILE, without --pretrained"
OF_OWN_LOSS = ("config", "variant", "weights", "weights_key", "groups", "calibration", "class_map", "loss")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    timm = "a name of timm"
    parser.add_argument("--model", required=True, help=f"{timm}, vit_mini, {', '.join(models.NAMES)}, {models.ANY}")
    add_learning_options(parser, tuple(RECIPES))
    add_training_options(parser)
    add_config_options(parser, "prune")
    add_external_options(parser, models.ANY, trains=True)
    add_device_options(parser, "-p")
    args = parser.parse_args(arguments)
    fill_from_preset(args)
    args.command = shlex.join(["python", "maskllm_train.py", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def own(name: str) -> bool:
    """Whether a model has batches and a loss of its own; else it is a classifier of timm."""
    return name in models.NAMES or (":" in name and not name.startswith("timm:"))


def check(args: argparse.Namespace) -> tuple[Recipe, Any]:
    """The course of tau and scaling, and the configuration of the data of a model that is not timm's; refuses what can
    be refused before heavy imports.
    """
    recipe = check_learning(args)
    if not own(args.model):
        for option in OF_OWN_LOSS:
            if vars(args)[option] not in (None, "auto"):
                raise UserError(f"--{option} is not for classifiers of timm: leave it out with {args.model}")
        args.model = args.model.removeprefix("timm:")
        args.data_path = args.data_path or images_of(args.model)
        args.max_skipped = 0.01 if args.max_skipped is None else args.max_skipped
        args.batch_size, args.workers = args.batch_size or 128, 4 if args.workers is None else args.workers
        return recipe, None
    check_undecoded(args)
    check_external(args, models.kind(args.model) == "external", models.NAMES, models.ANY)
    args.config, config = configure(args, "prune", PRUNE_CONFIGS[models.kind(args.model)])
    config.check(str(args.config), args.evaluate)
    config.check_calibration(str(args.config))
    return recipe, config.learning()


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    recipe, config = check(args)

    from datasets.labelled.data_path import check_data
    from engine.pruning.data_kinds import SUBJECTS
    from engine.training.learning_tasks import ImageTask, SubjectTask
    from engine.training.mask_learning import MaskLearning, read_prior, start_from_weights
    from models.checkpoint import read_weights
    from models.external import timm_classifier
    from models.external.model import prunable_view

    fabric = launch(args, args.folder, unused_parameters=not args.mask_only)
    if own(args.model):
        subject = SUBJECTS[models.kind(args.model)](models.find(args.model), config)
        task = SubjectTask(args, fabric, subject, subject.load(fabric), args.num_batches, config)
    else:
        check_data(args.data_path)
        sizes = {"num_classes": args.num_classes, "image_size": args.img_size, "drop_path": args.drop_path}
        model = timm_classifier.build(args.model, pretrained=args.pretrained, way_out=WAY_OUT, **sizes)
        if args.initial_checkpoint:
            timm_classifier.load(model, args.initial_checkpoint)
        view = prunable_view(model.to(fabric.device), include=args.include or (), exclude=args.exclude or ())
        settings = timm_classifier.data_config(model, args.img_size) | image_settings(args)
        task = ImageTask(args, fabric, model, view, settings)
    prior = read_prior(args.sparse_checkpoint, task.view, read_weights) if args.sparse_checkpoint else None
    if prior is not None and args.prior_weights:
        start_from_weights(args.prior_weights, task.view, prior, read_weights)
    learning = MaskLearning(args, fabric, task, recipe, prior)
    learning.fit()
    summary = learning.finish()
    if fabric.is_global_zero:
        print(summary)
    fabric.barrier()


if __name__ == "__main__":
    run(main)
