"""Fine-tune a pruned or dense DINO for image classification, and measure its accuracy.

    python image_classification.py --mask pruned_weights/multiflow/dino_multiflow_63_seed42_pruning_masks.safetensors
    python image_classification.py --dense --output_dir output/classification_dense
    python image_classification.py --mask MASK --variant base --dataset flowers102 --epochs 100 --lr 1e-4
    python image_classification.py --dense -pre facebook/dino-vitb16 --dataset cifar100 --batch_size 256 --devices 2

CIFAR-10 and CIFAR-100 are downloaded; Flowers102 and ImageNet lie in data/flowers102 and data/imagenet. Weights, mask,
metrics and a model card are written to <output_dir>/result/. A run that was stopped goes on from its snapshot when the
same command is given again.
"""

import argparse
from dataclasses import replace

import models
from configs.finetuning import CLASSIFICATION, ClassificationConfig
from configs.task import SCHEDULES
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options, count, positive_float, positive_int, share
from engine.options.finetuning import prepare

SCRIPT, TASK = "image_classification", "classification"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, SCRIPT, models.of_task(TASK))
    add = parser.add_argument_group("data and training; default: the configuration's").add_argument
    add("--dataset", choices=CLASSIFICATION, help="what is learned; default of the bundled model: bundled")
    add("--image_size", type=positive_int, help="side of the images in pixels; default: the configuration's")
    batch = "images in a step, of all devices together; default: the configuration's"
    add("--batch_size", type=positive_int, help=batch)
    add("--epochs", type=count, help="default: the configuration's")
    add("--lr", type=positive_float, help="peak learning rate; default: the configuration's")
    add("--warmup_frac", type=share, help="share of all steps in which the rate rises; default: the configuration's")
    add("--sched_type", choices=SCHEDULES, help="how the rate falls after that; default: the configuration's")
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    config = prepare(args, SCRIPT, ClassificationConfig, arguments)

    from configs.loading import load_config
    from datasets.tasks.image_classification import evaluation_sets, training_set
    from engine.evaluation.classification import Accuracy
    from engine.training.finetuning import Finetuning

    module, task = models.find(args.model), models.find_task(args.model, TASK)
    sizes = config.sizes(load_config(config.model_config, module.Config))
    train = training_set(config, sizes.image_size, args.seed)
    sets = evaluation_sets(config, sizes.image_size, args.debug)
    sizes = replace(sizes, classes=len(train.class_names))
    fabric = launch(args, args.output_dir)
    model = task.build(sizes, config.checkpoint, label_smoothing=config.label_smoothing)
    tuning = Finetuning(args, config, fabric, task, model, sizes, train)
    reading = {"workers": config.workers, "max_skipped": config.max_skipped}
    tests = {name: Accuracy(model, data, fabric, args.output_dir, **reading) for name, data in sets.items()}
    validate = tests.pop("val", None)
    if tuning.fit(validate=validate, select="top1" if validate else None):
        tuning.finish(tests)


if __name__ == "__main__":
    run(main)
