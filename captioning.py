"""Fine-tune a pruned or dense vision-language model for captioning, and let it describe images.

    python captioning.py --model xvlm --mask pruned_weights/multiflow/xvlm_multiflow_63_seed42_pruning_masks.safetensors
    python captioning.py --model blip --dense --output_dir output/captioning_dense
    python captioning.py --model xvlm --mask MASK --variant base -pre 4m-xvlm-vit-bert.pth --devices 4
    python captioning.py --model xvlm --mask MASK --load_capt_pretrain -pre output/RUN/last.pt
    python captioning.py --model hf:Salesforce/blip2-opt-2.7b --mask MASK --data captions.json

Weights, mask, metrics, a model card and the captions of each test set (captions_*.json, in COCO's format of results)
are written to <output_dir>/result/; with --skip_eval the captions, but no metrics. METEOR and the public tokenizer
need Java. A run that was stopped goes on from its snapshot when the same command is given again.
"""

import argparse
from functools import partial
from typing import Any

import models
from configs.finetuning import CaptioningConfig
from configs.foreign import ForeignCaptioningConfig
from configs.task import DEBUG_IMAGES
from datasets.tasks.captioning_metrics import check_package
from engine.launch import launch, run, script
from engine.options.command_line import Parser, add_finetuning_options
from engine.options.finetuning import is_foreign, prepare
from engine.options.own_data import add_own_data_options, check_own_data_options
from engine.options.recipe_values import add_foreign_options, add_recipe_options
from sparsity.errors import UserError

TASK = "captioning"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_finetuning_options(parser, TASK, models.of_task(TASK))
    add_own_data_options(parser, "captions")
    add_recipe_options(parser, tests=True)
    add_foreign_options(parser)
    first = "--pretraining_weights is a checkpoint of captioning_pretrain.py; xvlm only (default: no)"
    parser.add_argument("--load_capt_pretrain", action="store_true", help=first)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace, arguments: list[str] | None) -> CaptioningConfig:
    """Everything that can be refused before heavy imports."""
    check_own_data_options(args, is_foreign(args.model))
    if args.load_capt_pretrain:
        models.check_task(args.model, "captioning_pretrain")
        if args.weights is None:
            raise UserError("--load_capt_pretrain needs --pretraining_weights: last.pt of captioning_pretrain.py")
    if not args.skip_eval:
        check_package()
    return prepare(args, TASK, ForeignCaptioningConfig if is_foreign(args.model) else CaptioningConfig, arguments)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check_task(args.model, TASK)
    if args.check_data:
        from engine.reports.data_check import report_own_data

        return report_own_data(args, "captions")
    config = check(args, arguments)

    from datasets.tasks.captioning_metrics import CaptionScorer

    tuning, sets, captions = (foreign if is_foreign(args.model) else own)(args, config)
    scorer = CaptionScorer()
    captions = partial(captions, batch_size=config.batch_size_test, generation=config.generation)
    if not args.skip_eval:
        scorer.tell()
    val = captions(sets["val"], score=scorer.quick) if "val" in sets else None
    shown = {name: images for name, images in sets.items() if config.data or name != "val"}
    files = {name: args.output_dir / "result" / f"captions_{name}.json" for name in shown}
    tests = {name: captions(images, score=scorer, path=files[name]) for name, images in shown.items()}
    if tuning.fit(validate=val, select=scorer.best if val else None):
        tuning.finish(tests, unscored=[test.describe for test in tests.values()])


def own(args: argparse.Namespace, config: CaptioningConfig) -> tuple[Any, dict[str, Any], Any]:
    """A model of this project, the images to describe, and what describes them."""
    from configs.loading import load_config
    from datasets.tasks.captioning import evaluation_sets, training_set
    from datasets.text import TextEncoder
    from engine.evaluation.captioning import Captions, without_prompt
    from engine.training.finetuning import Finetuning
    from models.parts.captioning import check_captioning_weights

    module, task = models.find(args.model), models.find_task(args.model, TASK)
    sizes = config.sizes(load_config(config.model_config, module.Config))
    tokenizer, side = module.tokenizer(sizes), sizes.vision.image_size
    prompt = [tokenizer.cls_id, *tokenizer.encode(config.prompt)]
    config.check_lengths(len(prompt), sizes.max_tokens, sizes.text.max_positions)
    if args.load_capt_pretrain:
        check_captioning_weights(config.checkpoint)
    train = training_set(config, TextEncoder(tokenizer, sizes.max_tokens, **task.TEXT), side, args.seed)
    sets = evaluation_sets(config, side, args.debug)
    fabric = launch(args, args.output_dir)
    marks = {"end": tokenizer.sep_id, "pad": tokenizer.pad_id, "label_smoothing": config.label_smoothing}
    model = task.build(sizes, config.checkpoint, prompt=prompt, **marks)
    tuning = Finetuning(args, config, fabric, task, model, sizes, train)

    def decode(ids: list[int]) -> str:
        return without_prompt(tokenizer.decode(ids), config.prompt)

    reading = {"workers": config.workers, "max_skipped": config.max_skipped, "folder": args.output_dir}
    return tuning, sets, partial(Captions, model, decode=decode, fabric=fabric, **reading)


def foreign(args: argparse.Namespace, config: ForeignCaptioningConfig) -> tuple[Any, dict[str, Any], Any]:
    """A model of transformers that writes about images, on the user's data, which it preprocesses itself."""
    from datasets.own.captions import own_captions
    from datasets.own.sets import Gather, OwnImages, OwnPairs, picture
    from engine.evaluation.captioning import Captions
    from engine.training.finetuning import Finetuning

    task = models.find_task(args.model, TASK)
    data, held = own_captions(config)
    fabric = launch(args, args.output_dir, unused_parameters=True)
    model = task.build(args.model, config)
    train, make = OwnPairs(data, picture, seed=args.seed), model.questions
    tuning = Finetuning(args, config, fabric, task, model, model.sizes(), train, Gather(make.answered), save=task.save)
    sets = {"val": OwnImages(held, limit=DEBUG_IMAGES if args.debug else None)} if held else {}
    reading = {"workers": config.workers, "max_skipped": config.max_skipped, "gather": Gather(make.asked)}
    return tuning, sets, partial(Captions, model, decode=model.decode, fabric=fabric, folder=args.output_dir, **reading)


if __name__ == "__main__":
    run(main)
