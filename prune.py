"""Prune a vision-language model once, at several sparsities, without training.

    python prune.py -m xvlm -p multiflow
    python prune.py -m xvlm -p omp -s 50,75 --pool layer --evaluate
    python prune.py -m xvlm -p multiflow --pattern 2:4
    python prune.py -m xvlm -p multiflow --weights 4m-xvlm-vit-bert.pth

Masks, run times and a report are written to <output_dir>/<pruner>/.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import models
import pruners
from datasets.sources import PruneConfig
from engine.config import load_config
from engine.launch import add_device_options, launch, positive_int, run
from sparsity.allocation import POOLS, parse_sparsities
from sparsity.pattern import parse_pattern

SPARSITIES = "63,75,90"
SCHEDULES = ("linear", "exp", "const")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-p", "--pruner", required=True, metavar="PRUNER", help=", ".join(pruners.available()))
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join(models.NAMES))
    add("-s", "--sparsities", help=f"comma separated list of sparsities to prune at (default: {SPARSITIES})")
    add("--num_batches", type=positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add("-e", "--epochs", type=positive_int, default=1, help="pruning iterations of iterative pruners (default: %(default)s)")
    add("--schedule", choices=SCHEDULES, default="exp", help="of iterative pruners (default: %(default)s)")
    add("--lambda_", type=float, default=1e-5, help="ridge penalty of CHITA (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("pruned_weights"), help="default: ./%(default)s")
    add("--config", type=Path, help="default: configs/<model>/prune_<variant>.yaml")
    add("--weights", help="checkpoint file, or 'random'; default: the configuration's")
    add("--variant", choices=("auto", "base", "mini"), default="auto", help="auto: base where its weights are, else mini")
    add("--pool", choices=POOLS, help="weights that compete with each other; default: the pruner's own")
    add("--pattern", help="N:M, N weights kept of every M, instead of sparsities; e.g. 2:4")
    add("--evaluate", action="store_true", help="zero-shot retrieval, dense and at every sparsity")
    add("--save_scores", action="store_true", help="write the pruner's scores")
    add_device_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[PruneConfig, Path]:
    """Everything that can be refused before heavy imports; also resolves the variant and the weights."""
    pruners.check(args.pruner)
    models.check(args.model)
    for option in ("sparsities", "pool"):
        if args.pattern and getattr(args, option):
            raise ValueError(f"--pattern decides which weights go and how many: leave --{option} out")
    args.pattern = parse_pattern(args.pattern)
    args.sparsities = None if args.pattern else parse_sparsities(args.sparsities or SPARSITIES)
    where, config = find_config(args)
    config = dataclasses.replace(config, weights=args.weights or config.weights)
    if config.weights != "random" and not Path(config.weights).is_file():
        raise FileNotFoundError(f"{config.weights}: weights file not found; give --weights PATH, or --weights random")
    if args.evaluate:
        config.check_evaluation(str(where))
    return config, where


def find_config(args: argparse.Namespace) -> tuple[Path, PruneConfig]:
    """The configuration file and its content; `auto` is the full size where its weights are, else the bundled model."""
    if args.config:
        return args.config, load_config(args.config, PruneConfig)
    folder = Path("configs") / args.model
    variant = args.variant
    if variant == "auto":
        base = load_config(folder / "prune_base.yaml", PruneConfig)
        full_size = args.weights not in (None, "random") or Path(base.weights).is_file()
        variant = "base" if full_size else "mini"
        if not full_size:
            print(f"{base.weights} is not there: pruning the bundled {args.model}-mini (--variant base for the full size)")
    where = folder / f"prune_{variant}.yaml"
    return where, load_config(where, PruneConfig)


def main() -> None:
    args = parse()
    config, where = check(args)

    from datasets.text import TextEncoder
    from engine.pruning import Results, calibrate, timed, zero_shot
    from models.tokenizer import WordPiece

    pruner = pruners.build(args.pruner)
    if pruner.statistic:
        config.check_calibration(str(where))
    module = models.find(args.model)
    sizes = load_config(config.model_config, module.Config)
    encode = TextEncoder(WordPiece(sizes.vocab), sizes.max_tokens)
    fabric = launch(args)
    model = module.build(sizes, None if config.weights == "random" else config.weights).to(fabric.device).eval()
    view = module.prunable_view(model)
    results = Results(args, view, config, args.output_dir / args.pruner)

    begin = time.perf_counter()
    statistics = calibrate(pruner, view, config, sizes, encode, fabric, args)
    results.calibration_seconds = time.perf_counter() - begin
    if not fabric.is_global_zero:
        return
    evaluate = zero_shot(model, config, sizes, encode, fabric.device) if args.evaluate else None
    if evaluate:
        results.dense(evaluate())
    masks = pruner.masks(view, statistics, args.sparsities, pattern=args.pattern, pool=args.pool, seed=args.seed)
    for sparsity, chosen, seconds in timed(masks):
        results.add(sparsity, chosen, seconds, evaluate)
    if args.save_scores:
        results.save_scores(pruner.scores(view, statistics, seed=args.seed))
    print(results.finish())


if __name__ == "__main__":
    run(main)
