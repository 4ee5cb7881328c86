"""Prune a vision-language model once, at several sparsities, without training.

    python prune.py -m xvlm -p multiflow
    python prune.py -m xvlm -p omp -s 50,75 --pool layer --evaluate
    python prune.py -m xvlm -p multiflow --pattern 2:4
    python prune.py -m xvlm -p multiflow --weights 4m-xvlm-vit-bert.pth
    python prune.py -m xvlm --variant base --check_data

Masks, run times and a report are written to <output_dir>/<pruner>/.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import models
import pruners
from datasets.sources import PruneConfig
from engine.config import find_variant, load_config, read_yaml
from engine.files import check_writable
from engine.launch import launch, run
from engine.options import Parser, add_device_options, positive_float, positive_int, share
from sparsity.allocation import POOLS, parse_sparsities
from sparsity.pattern import parse_pattern

SPARSITIES = "63,75,90"
SCHEDULES = ("linear", "exp", "const")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-p", "--pruner", metavar="PRUNER", help=", ".join(pruners.available()))
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join(models.NAMES))
    add("-s", "--sparsities", help=f"comma separated list of sparsities to prune at (default: {SPARSITIES})")
    add("--num_batches", type=positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add("-e", "--epochs", type=positive_int, default=1, help="rounds of iterative pruners (default: %(default)s)")
    add("--schedule", choices=SCHEDULES, default="exp", help="of iterative pruners (default: %(default)s)")
    add("--lambda_", type=positive_float, default=1e-5, help="ridge penalty of CHITA (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("pruned_weights"), help="default: ./%(default)s")
    add("--config", type=Path, help="default: configs/<model>/prune_<variant>.yaml")
    add("--weights", help="checkpoint file, or 'random'; default: the configuration's")
    variants = "auto (default): base where its weights are, else mini"
    add("--variant", choices=("auto", "base", "mini"), default="auto", help=variants)
    add("--pool", choices=POOLS, help="weights that compete with each other; default: the pruner's own")
    add("--pattern", help="N:M, N weights kept of every M, instead of sparsities; e.g. 2:4 (default: unstructured)")
    add("--evaluate", action="store_true", help="zero-shot retrieval, dense and at every sparsity (default: no)")
    add("--save_scores", action="store_true", help="write the pruner's scores (default: no)")
    add("--max_skipped", type=share, help="share of unreadable images that is tolerated; default: the configuration's")
    add("--check_data", action="store_true", help="only list what would be read and what of it is missing")
    add_device_options(parser)
    args = parser.parse_args(arguments)
    if not (args.pruner or args.check_data):
        parser.error("the following arguments are required: -p/--pruner")
    return args


def configure(args: argparse.Namespace) -> PruneConfig:
    """The configuration, with what the command line says instead; `args.config` becomes its file."""
    models.check(args.model)
    args.config = args.config or find_variant(Path("configs", args.model), "prune", args.variant, args.weights)
    given = {name: getattr(args, name) for name in ("weights", "max_skipped") if getattr(args, name) is not None}
    return dataclasses.replace(load_config(args.config, PruneConfig), **given)


def list_data(args: argparse.Namespace) -> bool:
    """Print what the configuration reads; whether all of it is there."""
    from datasets.check import check_data, table

    findings = check_data(configure(args))
    print(args.config, table(findings), sep="\n")
    return all(finding.ok for finding in findings)


def check(args: argparse.Namespace) -> PruneConfig:
    """Everything that can be refused before heavy imports; also resolves sparsities, pattern and configuration."""
    pruners.check(args.pruner)
    args.pattern = parse_pattern(args.pattern)
    for option in ("sparsities", "pool"):
        if args.pattern and getattr(args, option):
            raise ValueError(f"--pattern decides which weights go and how many: leave --{option} out")
    args.sparsities = None if args.pattern else parse_sparsities(args.sparsities or SPARSITIES)
    config = configure(args)
    read_yaml(config.model_config)
    config.check_weights()
    if args.evaluate:
        config.check_evaluation(str(args.config))
    check_writable(args.output_dir / args.pruner, "--output_dir")
    return config


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.check_data:
        sys.exit(0 if list_data(args) else 1)
    config = check(args)
    pruner = pruners.build(args.pruner)
    if pruner.statistic:
        config.check_calibration(str(args.config))

    from datasets.calibration import Calibration
    from datasets.text import TextEncoder
    from engine.pruning import Results, calibrate, timed
    from engine.retrieval import ZeroShot
    from models.tokenizer import WordPiece

    module = models.find(args.model)
    sizes = load_config(config.model_config, module.Config)
    encode = TextEncoder(WordPiece(sizes.vocab), sizes.max_tokens)
    fabric = launch(args)
    model = module.build(sizes, config.checkpoint).to(fabric.device).eval()
    view = module.prunable_view(model)
    results = Results(args.output_dir / args.pruner, view, vars(args), config, writes=fabric.is_global_zero)
    data = evaluate = None
    if pruner.statistic:
        share_of_rank = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        amount = {"num_batches": args.num_batches, "seed": args.seed}
        data = Calibration(config, encode, sizes.vision, results.folder, **amount, **share_of_rank)
    if args.evaluate:
        reading = {"workers": config.workers, "max_skipped": config.max_skipped}
        evaluate = ZeroShot(model, config.evaluation, encode, fabric, sizes.vision, results.folder, **reading)
        results.dense(evaluate())

    statistics, results.calibration_seconds = calibrate(pruner, view, data, fabric)
    masks = pruner.masks(view, statistics, args.sparsities, pattern=args.pattern, pool=args.pool, seed=args.seed)
    for sparsity, chosen, seconds in timed(masks):
        results.add(sparsity, chosen, seconds, evaluate)
    if args.save_scores:
        results.save_scores(pruner.scores(view, statistics, seed=args.seed))
    summary = results.finish()
    if fabric.is_global_zero:
        print(summary)
    fabric.barrier()


if __name__ == "__main__":
    run(main)
