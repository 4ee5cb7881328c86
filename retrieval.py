"""Fine-tune a pruned or dense vision-language model for image-text retrieval, and evaluate it.

    python retrieval.py --model xvlm --mask pruned_weights/multiflow/xvlm_multiflow_63_seed42_pruning_masks.safetensors
    python retrieval.py --model xvlm --dense --output_dir output/retrieval_dense
    python retrieval.py --model xvlm --dense --variant base -pre 4m-xvlm-vit-bert.pth --devices 4

Weights, mask, metrics and a model card are written to <output_dir>/result/. A run that was stopped goes on from its
snapshot when the same command is given again.
"""

import argparse
from functools import partial

import models
from configs.finetuning import RetrievalConfig
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import prepare
from engine.options.recipe_values import add_recipe_options

TASK = "retrieval"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK))
    add_recipe_options(parser)
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    config = prepare(args, TASK, RetrievalConfig, arguments)

    from configs.loading import load_config
    from datasets.tasks.retrieval import training_set
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
    recalls = partial(ZeroShot, model, encode=encode, fabric=fabric, vision=sizes.vision, folder=args.output_dir)
    tests = {name: recalls(data, **reading) for name, data in config.evaluations(args.debug).items()}
    if tuning.fit(validate=tests.pop("val"), select="r_mean"):
        tuning.finish(tests)


if __name__ == "__main__":
    run(main)
