"""Fine-tune a pruned or dense vision-language model for visual question answering, and let it answer.

    python vqa.py --model xvlm --mask pruned_weights/multiflow/xvlm_multiflow_63_seed42_pruning_masks.safetensors
    python vqa.py --model xvlm --dense --output_dir output/vqa_dense
    python vqa.py --model xvlm --mask MASK --inherit_mask --variant base -pre 4m-xvlm-vit-bert.pth --devices 4
    python vqa.py --model hf:Salesforce/blip-vqa-base --mask MASK --data questions.json

Weights, mask, metrics, a model card and the answers to each test set are written to <output_dir>/result/;
answers_test.json is what the server of the VQA challenge takes. A run that was stopped goes on from its snapshot when
the same command is given again.
"""

import argparse
from functools import partial
from typing import Any

import models
from configs.finetuning import VQAConfig
from configs.foreign import ForeignVQAConfig
from configs.task import DEBUG_IMAGES
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import is_foreign, prepare
from engine.options.own_data import add_own_data_options, check_own_data_options
from engine.options.recipe_values import add_foreign_options, add_recipe_options

TASK = "vqa"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK))
    add_own_data_options(parser, "questions")
    add_recipe_options(parser, tests=True)
    add_foreign_options(parser)
    inherited = "xvlm: the decoder takes the masks of the layers that it copies; blip's always does (default: no)"
    parser.add_argument("--inherit_mask", action="store_true", help=inherited)
    return parser.parse_args(arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    if args.check_data:
        from engine.reports.data_check import report_own_data

        return report_own_data(args, "questions")
    check_own_data_options(args, is_foreign(args.model))
    config = prepare(args, TASK, ForeignVQAConfig if is_foreign(args.model) else VQAConfig, arguments)
    tuning, sets, answering = (foreign if is_foreign(args.model) else own)(args, config)
    validate = answering(sets["val"]) if "val" in sets else None
    folder = args.output_dir / "result"
    asked = {name: questions for name, questions in sets.items() if config.data or name != "val"}
    tests = {name: answering(questions, path=folder / f"answers_{name}.json") for name, questions in asked.items()}
    if tuning.fit(validate=validate, select="accuracy" if validate else None):
        tuning.finish(tests)


def own(args: argparse.Namespace, config: VQAConfig) -> tuple[Any, dict[str, Any], Any]:
    """A model of this project, the questions, and what answers them from a closed list."""
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
    return tuning, sets, partial(Answers, model, answers=answers, fabric=fabric, folder=args.output_dir, **ranking)


def foreign(args: argparse.Namespace, config: ForeignVQAConfig) -> tuple[Any, dict[str, Any], Any]:
    """A model of transformers that writes answers, on the user's questions, which it preprocesses itself."""
    from datasets.own.questions import own_questions
    from datasets.own.sets import Gather
    from datasets.tasks.own_questions import OwnAnswers, OwnAsked
    from engine.evaluation.vqa import WrittenAnswers
    from engine.training.finetuning import Finetuning

    task = models.find_task(args.model, TASK)
    data, held = own_questions(config)
    fabric = launch(args, args.output_dir, unused_parameters=True)
    model = task.build(args.model, config)
    train, make = OwnAnswers(data, seed=args.seed), model.questions
    tuning = Finetuning(args, config, fabric, task, model, model.sizes(), train, Gather(make.answered), save=task.save)
    sets = {"val": OwnAsked(held, limit=DEBUG_IMAGES if args.debug else None)} if held else {}
    reading = {"workers": config.workers, "max_skipped": config.max_skipped, "batch_size": config.batch_size_test}
    writing = {"decode": model.decode, "gather": Gather(make.asked), "generation": config.generation, **reading}
    return tuning, sets, partial(WrittenAnswers, model, fabric=fabric, folder=args.output_dir, **writing)


if __name__ == "__main__":
    run(main)
