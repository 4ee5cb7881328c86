"""Fine-tune a pruned or dense vision-language model for visual question answering, and let it answer.

    python vqa.py --model xvlm --mask pruned_weights/multiflow/xvlm_multiflow_63_seed42_pruning_masks.safetensors
    python vqa.py --model xvlm --dense --output_dir output/vqa_dense
    python vqa.py --model xvlm --mask MASK --inherit_mask --variant base -pre 4m-xvlm-vit-bert.pth --devices 4

Weights, mask, metrics, a model card and the answers to each test set are written to <output_dir>/result/;
answers_test.json is what the server of the VQA challenge takes. A run that was stopped goes on from its snapshot when
the same command is given again.
"""

import argparse
from functools import partial

import models
from configs.finetuning import VQAConfig
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import prepare
from engine.options.recipe_values import add_recipe_options

TASK = "vqa"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK))
    add_recipe_options(parser, tests=True)
    inherited = "xvlm: the decoder takes the masks of the layers that it copies; blip's always does (default: no)"
    parser.add_argument("--inherit_mask", action="store_true", help=inherited)
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    config = prepare(args, TASK, VQAConfig, arguments)

    from configs.loading import load_config
    from datasets.tasks.vqa import Words, candidates, evaluation_sets, training_set
    from engine.evaluation.vqa import Answers
    from engine.training.finetuning import Finetuning

    module, task = models.find(args.model), models.find_task(args.model, TASK)
    sizes = config.sizes(load_config(config.model_config, module.Config))
    words = Words(module.tokenizer(sizes), sizes.max_tokens, **task.TEXT, answer_ends=task.ANSWER_ENDS)
    side, answers = sizes.vision.image_size, candidates(config)
    train = training_set(config, words, side, args.seed)
    sets = evaluation_sets(config, words, side, args.debug)
    fabric = launch(args, args.output_dir)
    model = task.build(sizes, config.checkpoint, inherit_mask=args.inherit_mask)
    tuning = Finetuning(args, config, fabric, task, model, sizes, train, gather=words.gather_training)
    reading = {"workers": config.workers, "max_skipped": config.max_skipped}
    ranking = {"k_test": config.k_test, "batch_size": config.batch_size_test, **reading}
    answering = partial(Answers, model, answers=answers, fabric=fabric, folder=args.output_dir, **ranking)
    validate = answering(sets.pop("val")) if "val" in sets else None
    folder = args.output_dir / "result"
    tests = {name: answering(asked, path=folder / f"answers_{name}.json") for name, asked in sets.items()}
    if tuning.fit(validate=validate, select="accuracy" if validate else None):
        tuning.finish(tests)


if __name__ == "__main__":
    run(main)
