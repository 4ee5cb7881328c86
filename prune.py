"""Prune a vision-language model once, at several sparsities, without training.

    python prune.py -m xvlm -p multiflow
    python prune.py -m xvlm -p omp -s 50,75 --pool layer --evaluate
    python prune.py -m xvlm -p multiflow --pattern 2:4
    python prune.py -m xvlm -p multiflow --weights 4m-xvlm-vit-bert.pth
    python prune.py -m xvlm --variant base --check_data

Masks, run times and a report are written to <output_dir>/<pruner>/.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import models
import pruners
from datasets.sources import PruneConfig
from engine.config import configure, load_config, read_yaml
from engine.files import check_writable
from engine.launch import launch, run
from engine.options import Parser, add_config_options, add_device_options, add_pruner_options, positive_int
from sparsity.allocation import POOLS, parse_sparsities
from sparsity.pattern import parse_pattern

SPARSITIES = "63,75,90"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-p", "--pruner", metavar="PRUNER", help=", ".join(pruners.available()))
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join(models.NAMES))
    add("-s", "--sparsities", help=f"comma separated list of sparsities to prune at (default: {SPARSITIES})")
    add("--num_batches", type=positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add_pruner_options(parser)
    add("--output_dir", type=Path, default=Path("pruned_weights"), help="default: ./%(default)s")
    add("--pool", choices=POOLS, help="weights that compete with each other; default: the pruner's own")
    add("--pattern", help="N:M, N weights kept of every M, instead of sparsities; e.g. 2:4 (default: unstructured)")
    add("--evaluate", action="store_true", help="zero-shot retrieval, dense and at every sparsity (default: no)")
    add("--save_scores", action="store_true", help="write the pruner's scores (default: no)")
    add("--check_data", action="store_true", help="only list what would be read, and what is missing (default: no)")
    add_config_options(parser, "prune")
    add_device_options(parser)
    args = parser.parse_args(arguments)
    if not (args.pruner or args.check_data):
        parser.error("the following arguments are required: -p/--pruner")
    return args


def list_data(args: argparse.Namespace) -> bool:
    """Print what the configuration reads; whether all of it is there."""
    from datasets.check import check_data, table

    path, config = configure(args, "prune", PruneConfig)
    findings = check_data(config)
    print(path, table(findings), sep="\n")
    return all(finding.ok for finding in findings)


def check(args: argparse.Namespace) -> PruneConfig:
    """Everything that can be refused before heavy imports; also resolves sparsities, pattern and configuration."""
    pruners.check(args.pruner)
    args.pattern = parse_pattern(args.pattern)
    for option in ("sparsities", "pool"):
        if args.pattern and getattr(args, option) is not None:
            raise ValueError(f"--pattern decides which weights go and how many: leave --{option} out")
    given = SPARSITIES if args.sparsities is None else args.sparsities
    args.sparsities = None if args.pattern else parse_sparsities(given)
    args.config, config = configure(args, "prune", PruneConfig)
    read_yaml(config.model_config)
    config.check_weights()
    if args.evaluate:
        config.check_evaluation(str(args.config))
    check_writable(args.output_dir / args.pruner, "--output_dir")
    return config


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    models.check(args.model)
    if args.check_data:
        sys.exit(0 if list_data(args) else 1)
    config = check(args)
    pruner = pruners.build(args.pruner, **{name: vars(args)[name] for name in pruners.options(args.pruner)})
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
        ranks = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        data = Calibration(config, encode, sizes.vision, results.folder, args.num_batches, args.seed, **ranks)
    if args.evaluate:
        reading = {"workers": config.workers, "max_skipped": config.max_skipped}
        evaluate = ZeroShot(model, config.evaluation, encode, fabric, sizes.vision, results.folder, **reading)
        results.dense(evaluate())

    measure = partial(calibrate, pruner, view, data, fabric, args.seed)
    with results.calibration():
        statistics = measure()
    choice = {"pattern": args.pattern, "pool": args.pool, "seed": args.seed, "again": measure}
    for sparsity, chosen, seconds in timed(pruner.masks(view, statistics, args.sparsities, **choice)):
        results.add(sparsity, chosen, seconds, evaluate)
    if args.save_scores:
        results.save_scores(pruner.scores(view, statistics, seed=args.seed))
    summary = results.finish()
    if fabric.is_global_zero:
        print(summary)
    fabric.barrier()


if __name__ == "__main__":
    run(main)
