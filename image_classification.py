"""Fine-tune a pruned or dense classifier of images, and measure its accuracy: DINO, or any of timm and transformers.

    python image_classification.py --mask pruned_weights/multiflow/dino_multiflow_63_seed42_pruning_masks.safetensors
    python image_classification.py --dense --output_dir output/classification_dense
    python image_classification.py --mask MASK --variant base --dataset flowers102 --epochs 100 --lr 1e-4
    python image_classification.py --dense -pre facebook/dino-vitb16 --dataset cifar100 --batch_size 256 --devices 2
    python image_classification.py --model timm:vit_base_patch16_224.augreg_in21k --dense --dataset FOLDER --mixup 0.8
    python image_classification.py --model hf:google/vit-base-patch16-224 --mask MASK --dataset FOLDER --epochs 10

FOLDER has train/ and val/ with a folder of images for each class, or these folders themselves. The head is a new one
unless its classes are those of the folder, by name. CIFAR-10 and CIFAR-100 are downloaded; Flowers102 and ImageNet lie
in data/flowers102 and data/imagenet. Weights, mask, metrics and a model card are written to <output_dir>/result/, as
timm or transformers load them. A run that was stopped goes on from its snapshot when the same command is given again.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import models
from configs.finetuning import CLASSIFICATION, ClassificationConfig
from configs.foreign import ForeignClassificationConfig
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import is_foreign, prepare
from engine.options.recipe_values import add_classification_options, add_recipe_options, check_classification

if TYPE_CHECKING:
    from engine.training.finetuning import Finetuning

SCRIPT, TASK = "image_classification", "classification"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, SCRIPT, models.of_task(TASK))
    add_recipe_options(parser)
    add_classification_options(parser, CLASSIFICATION)
    return parser.parse_args(arguments)


def own(args: argparse.Namespace, config: ClassificationConfig, task: ModuleType) -> "tuple[Finetuning, dict]":
    """Return a model of this project in training, and what it is tested on."""
    from configs.loading import load_config
    from datasets.tasks.image_classification import class_names, evaluation_sets, training_set
    from engine.training.finetuning import Finetuning, save_task_weights
    from models.external.labels import check_teacher, classes_beside, names_beside, save_classes

    sizes, free = config.sizes(load_config(config.model_config, models.find(args.model).Config)), args.distill == 1
    train = training_set(config, sizes.image_size, args.seed, unlabelled=free)
    sets = evaluation_sets(config, sizes.image_size, args.debug, unlabelled=free)
    before = [path for path in (args.teacher, Path(config.weights) if config.own else None) if path]
    names = class_names(config, free) or next(filter(None, map(names_beside, before)), ())
    check_teacher(names, args.teacher)
    sizes = replace(sizes, classes=len(names) or sizes.classes)
    fabric = launch(args, args.output_dir)
    beside = classes_beside(Path(config.weights)) if config.own else None
    same = beside is not None and beside.order(names) == list(range(len(names)))
    keep = same or not (config.own and names)
    model = task.build(sizes, config.checkpoint, label_smoothing=config.label_smoothing, keep=keep)

    def save(model: task.DINOClassification, folder: Path) -> None:
        save_task_weights(model, folder)
        if config.own and names:
            save_classes(names, folder)

    return Finetuning(args, config, fabric, task, model, sizes, train, save=save), sets


def foreign(
    args: argparse.Namespace, config: ForeignClassificationConfig, task: ModuleType
) -> "tuple[Finetuning, dict]":
    """Return a model of timm or transformers in training, and what it is tested on."""
    from datasets.labelled.data_path import Plain
    from datasets.labelled.timm_images import augmented
    from datasets.tasks.image_classification import class_names, evaluation_sets, training_set
    from engine.training.finetuning import Finetuning
    from engine.training.timm_training import Labelled
    from models.external.labels import check_teacher, names_beside

    augmentation, free = config.augmentation, args.distill == 1
    names = class_names(config, free) or (names_beside(args.teacher) if args.teacher else ())
    check_teacher(names, args.teacher)
    fabric = launch(args, args.output_dir, unused_parameters=True)
    mixing = {"smoothing": config.label_smoothing, "seed": args.seed}
    labelled = Labelled(argparse.Namespace(**asdict(augmentation), **mixing), len(names))
    drop_path = augmentation.drop_path
    model = task.build(args.model, config, names, loss=labelled.loss, seed=args.seed, drop_path=drop_path)
    images = model.preparation
    train = training_set(config, images.side, args.seed, augmented(images.settings, augmentation), free)
    sets = evaluation_sets(config, images.side, args.debug, Plain(images.evaluate), free)
    how = {"read": labelled.read, "save": task.save}
    return Finetuning(args, config, fabric, task, model, model.sizes(), train, **how), sets


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    check_classification(args, is_foreign(args.model))
    schema = ForeignClassificationConfig if is_foreign(args.model) else ClassificationConfig
    config = prepare(args, SCRIPT, schema, arguments)

    from engine.evaluation.classification import measure

    task = models.find_task(args.model, TASK)
    tuning, sets = (foreign if is_foreign(args.model) else own)(args, config, task)
    tests = {name: measure(tuning, data) for name, data in sets.items()}
    validate = tests.pop("val", None)
    if tuning.fit(validate=validate, select=next(iter(validate.metrics)) if validate else None):
        tuning.finish(tests)


if __name__ == "__main__":
    run(main)
