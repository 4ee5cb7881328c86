"""Train a pruned or dense XVLM to write about images, on image-text pairs, before captioning.py fine-tunes it.

    python captioning_pretrain.py --model xvlm --mask MASK --variant base -pre 4m-xvlm-vit-bert.pth --devices 4
    python captioning_pretrain.py --model xvlm --dense --variant mini --output_dir output/first
    python captioning.py --model xvlm --dense --variant mini --load_capt_pretrain -pre output/first/last.pt

The checkpoint for captioning.py is last.pt in --output_dir; weights, mask and a model card are in result/ beside it. A
run that was stopped goes on from last.pt when the same command is given again.
"""

import argparse

import models
from configs.finetuning import CaptioningPretrainConfig
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import prepare
from engine.options.recipe_values import add_recipe_options

TASK = "captioning_pretrain"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK), measures=False)
    add_recipe_options(parser)
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    config = prepare(args, TASK, CaptioningPretrainConfig, arguments)

    from configs.loading import load_config
    from datasets.tasks.captioning_pretraining import read, training_set
    from datasets.text import TextEncoder
    from engine.training.finetuning import Finetuning

    module, task = models.find(args.model), models.find_task(args.model, TASK)
    sizes = config.sizes(load_config(config.model_config, module.Config))
    tokenizer = module.tokenizer(sizes)
    encode = TextEncoder(tokenizer, sizes.max_tokens, **task.TEXT)
    train = training_set(config, encode, sizes.vision.image_size, args.seed)
    fabric = launch(args, args.output_dir)
    marks = {"end": tokenizer.sep_id, "pad": tokenizer.pad_id, "label_smoothing": config.label_smoothing}
    model = task.build(sizes, config.checkpoint, prompt=[tokenizer.cls_id], **marks)
    tuning = Finetuning(args, config, fabric, task, model, sizes, train, read=read)
    if tuning.fit():
        tuning.finish({})


if __name__ == "__main__":
    run(main)
