"""Compare pruners by zero-shot retrieval, or by accuracy, over sparsities and seeds, without training.

    python compare.py -m xvlm -s 63,75,90 --seeds 42,43,44 --num_batches 100
    python compare.py -m xvlm -p omp,lamp,multiflow --k_test 8
    python compare.py -m xvlm -p snip,itersnip --epochs 10
    python compare.py -m xvlm --plans plans.yaml              # name: {pruner: wanda, reconstruct: sparsegpt, ...}
    python compare.py --finetuned output/finetune_mini --metrics 'r_mean,cider*,accuracy,top1'
    python compare.py --nm output/nm_table/results

One pass over the calibration data of a seed serves all pruners that need the same statistic, at all sparsities. The
runs are in <output_dir>/results.csv, a row as soon as each is done; the same command again only does what is missing.
Means and standard errors over the seeds are in table.md and table.tex.

--finetuned and --nm only put finished runs beside each other, and write the table to FOLDER/table.md, of
FOLDER/<run>/dense/result/metrics.json and FOLDER/<run>/<sparsity>/result/metrics.json of the fine-tuning scripts, or
FOLDER/<method>/<seed>.json of scripts/nm_table.sh.
"""

import argparse
import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import models
import pruners
from configs.loading import configure, read_yaml
from configs.pruning import PRUNE_CONFIGS, PrunedModel
from engine.launch import launch, run, script
from engine.options import command_line as options
from engine.options.plans import plans_of
from engine.reports.finetuning_table import write_table as runs_table
from engine.reports.nm_table import write_table as nm_table
from sparsity.allocation.budget import parse_sparsities
from sparsity.files import check_writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    names = ", ".join(pruners.available())
    add("-p", "--pruners", help=f"comma separated list of {names} (default: all of one pass at most)")
    add("--plans", type=Path, metavar="FILE", help="YAML, {name: {pruner: NAME, pattern: '2:4', ...}} (default: none)")
    add("--pattern", help="N:M of all plans, instead of sparsities, or blockRxC (default: unstructured)")
    add("-m", "--model", metavar="MODEL", help=", ".join(models.NAMES))
    add("-s", "--sparsities", default="63,75,90", help="comma separated list (default: %(default)s)")
    add("--seeds", type=options.seeds, default="42,43,44", help="comma separated list (default: %(default)s)")
    add("--num_batches", type=options.positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add("--k_test", type=options.count, default=0, help="candidates that are re-ranked; 0: none (default: %(default)s)")
    options.add_pruner_options(parser)
    add("--output_dir", type=Path, default=Path("comparison"), help="default: ./%(default)s")
    add("--finetuned", type=Path, metavar="FOLDER", help="only the table of these fine-tuned runs (default: no)")
    add("--metrics", type=options.globs, default=["*"], help="of --finetuned: comma separated globs (default: all)")
    add("--nm", type=Path, metavar="FOLDER", help="only the table of these N:M results (default: no)")
    options.add_config_options(parser, "prune")
    options.add_one_device(parser)
    args = parser.parse_args(arguments)
    args.plan = options.plan_options(parser, arguments)
    if sum(given is not None for given in (args.model, args.finetuned, args.nm)) != 1:
        parser.error("give one of -m/--model, --finetuned and --nm")
    return args


def check(args: argparse.Namespace) -> PrunedModel:
    """Everything that can be refused before heavy imports; also resolves pruners, sparsities and configuration."""
    if args.pruners is not None:
        args.pruners = list(dict.fromkeys(name.strip() for name in args.pruners.split(",")))
        for name in args.pruners:
            pruners.check(name)
    models.check(args.model)
    args.sparsities = list(dict.fromkeys(parse_sparsities(args.sparsities)))
    args.config, config = configure(args, "prune", PRUNE_CONFIGS[models.KINDS[args.model]])
    read_yaml(config.model_config)
    config.check_weights()
    config.check_evaluation(str(args.config))
    check_writable(args.output_dir, "--output_dir")
    return config.reranking(args.k_test)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.finetuned or args.nm:
        path, table = runs_table(args.finetuned, args.metrics) if args.finetuned else nm_table(args.nm)
        print(f"{table}\n\nresults: {path}")
        return
    config, usual = check(args), [name for name in pruners.available() if pruners.one_shot(name)]
    files = plans_of(args.plans, args.pruners, usual, args.plan, args.pattern, pruners.own_options)
    engines = {name: file.build(name, pruners.build) for name, file in files.items()}
    if any(engine.plan.statistics for engine in engines.values()):
        config.check_calibration(str(args.config))

    from datasets.calibration.data_kinds import clear_skipped
    from engine.pruning.comparison import Entry, Ledger, compare, digests, summarise, wanted, write_tables
    from engine.pruning.data_kinds import SUBJECTS
    from engine.pruning.run import calibrations, save_arguments
    from engine.ranks import place_of

    chosen = {name: Entry(engines[name], file.pattern, file.groups) for name, file in files.items()}
    subject = SUBJECTS[models.KINDS[args.model]](models.find(args.model), config)
    fabric = launch(args, args.output_dir)
    view, file = subject.load(fabric), args.output_dir / "results.csv"
    digest = digests(view, subject.sizes, config, vars(args), chosen)
    ledger = Ledger(file, args.model, view.groups, subject.metrics, digest)
    if not ledger.rows:  # else it goes on
        clear_skipped(args.output_dir, place_of(fabric))
    evaluate = subject.evaluation(args.output_dir)
    save_arguments(vars(args), config, args.output_dir)

    @lru_cache(maxsize=1)
    def data(seed: int) -> Any:
        return subject.calibration(args.output_dir, args.num_batches, seed)

    def passes(name: str, seed: int) -> Any:
        own = data(seed) if engines[name].plan.statistics else None
        return calibrations(own, fabric, seed, name, folder=args.output_dir, config=config)

    for entry in chosen.values():
        rounds = data(args.seeds[0]).rounds if entry.plan.statistics else None
        entry.engine.preflight(view, entry.request(args.sparsities, 0), rounds=rounds, folder=args.output_dir)
    compare(view, chosen, args.sparsities, args.seeds, ledger, calibrations=passes, evaluate=evaluate)
    rows = summarise(ledger, wanted(chosen, args.sparsities, args.seeds))
    evaluated = dataclasses.asdict(config.evaluation)
    facts = {"weights": config.weights, "num_batches": args.num_batches}
    facts |= {name: value for name, value in evaluated.items() if name == "k_test"}  # of retrieval alone
    print(write_tables(args.output_dir, args.model, facts | {"seeds": ", ".join(map(str, args.seeds))}, rows))


if __name__ == "__main__":
    run(main)
