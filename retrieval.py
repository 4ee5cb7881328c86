"""Fine-tune a pruned or dense vision-language model for image-text retrieval, and evaluate it.

    python retrieval.py --model xvlm --mask pruned_weights/multiflow/xvlm_multiflow_63_seed42_pruning_masks.safetensors
    python retrieval.py --model xvlm --dense --output_dir output/retrieval_dense
    python retrieval.py --model xvlm --dense --variant base -pre 4m-xvlm-vit-bert.pth --devices 4
    python retrieval.py --model hf:openai/clip-vit-base-patch32 --mask MASK --data captions.json
    python retrieval.py --model blip --dense --data captions.json --check_data

Weights, mask, metrics and a model card are written to <output_dir>/result/. A run that was stopped goes on from its
snapshot when the same command is given again.
"""

import argparse
from functools import partial
from typing import Any

import models
from configs.finetuning import RetrievalConfig
from configs.foreign import ForeignRetrievalConfig
from configs.task import DEBUG_IMAGES
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import is_foreign, prepare
from engine.options.own_data import add_own_data_options, check_own_data_options
from engine.options.recipe_values import add_foreign_options, add_recipe_options

TASK = "retrieval"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK))
    add_own_data_options(parser, "captions")
    add_recipe_options(parser)
    add_foreign_options(parser)
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    if args.check_data:
        from engine.reports.data_check import report_own_data

        return report_own_data(args, "captions")
    check_own_data_options(args, is_foreign(args.model))
    schema = ForeignRetrievalConfig if is_foreign(args.model) else RetrievalConfig
    config = prepare(args, TASK, schema, arguments)
    tuning, tests = (foreign if is_foreign(args.model) else own)(args, config)
    val = tests.get("val") if config.data else tests.pop("val")
    if tuning.fit(validate=val, select="r_mean" if val else None):
        tuning.finish(tests)


def own(args: argparse.Namespace, config: RetrievalConfig) -> tuple[Any, dict[str, Any]]:
    """A model of this project, on its own data or the user's."""
    from configs.loading import load_config
    from datasets.tasks.retrieval import own_evaluation, training_set
    from datasets.text import TextEncoder
    from engine.evaluation.retrieval import ZeroShot
    from engine.training.finetuning import Finetuning

    module, task = models.find(args.model), models.find_task(args.model, TASK)
    sizes = config.sizes(load_config(config.model_config, module.Config))
    encode = TextEncoder(module.tokenizer(sizes), sizes.max_tokens, **task.TEXT)
    train = training_set(config, encode, sizes.vision.image_size, args.seed)
    fabric = launch(args, args.output_dir, sync_buffers=False)
    model = task.build(sizes, config.checkpoint, negative_all_rank=config.negative_all_rank)
    tuning = Finetuning(args, config, fabric, task, model, sizes, train)
    reading = {name: getattr(config, name) for name in ("workers", "max_skipped", "decoding")}
    held = own_evaluation(config, sizes.vision.image_size, args.debug)
    recalls = partial(ZeroShot, model, encode=encode, fabric=fabric, vision=sizes.vision, folder=args.output_dir)
    named = config.evaluations(args.debug)
    return tuning, {name: recalls(data, own=held, **reading) for name, data in named.items()}


def foreign(args: argparse.Namespace, config: ForeignRetrievalConfig) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with two towers, on the user's data, which it preprocesses itself."""
    from datasets.own.captions import own_captions
    from datasets.own.sets import Gather, OwnImages, OwnPairs, picture
    from engine.evaluation.two_towers import Recalls
    from engine.training.finetuning import Finetuning

    task = models.find_task(args.model, TASK)
    data, held = own_captions(config)
    fabric = launch(args, args.output_dir, sync_buffers=False)
    model = task.build(args.model, config)
    train, make = OwnPairs(data, picture, seed=args.seed), model.batches
    tuning = Finetuning(args, config, fabric, task, model, model.sizes(), train, Gather(make.pairs), save=task.save)
    reading = {"workers": config.workers, "max_skipped": config.max_skipped, "batch_size": config.batch_size_test}
    if held is None:
        return tuning, {}
    shown, making = OwnImages(held, limit=DEBUG_IMAGES if args.debug else None), {"gather": Gather(make.images)}
    return tuning, {"val": Recalls(model, shown, fabric, args.output_dir, texts=make.texts, **making, **reading)}


if __name__ == "__main__":
    run(main)
