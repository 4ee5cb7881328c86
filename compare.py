"""Compare pruners by retrieval, accuracy, or fidelity to the dense model, over sparsities and seeds, without training.

    python compare.py -m xvlm -s 63,75,90 --seeds 42,43,44 --num_batches 100
    python compare.py -m xvlm -p omp,lamp,multiflow --k_test 8
    python compare.py -m xvlm -p snip,itersnip --epochs 10
    python compare.py -m hf:FOLDER -p omp,wanda,sparsegpt --calibration captions.txt
    python compare.py -m xvlm --plans plans.yaml              # name: {pruner: wanda, reconstruct: sparsegpt, ...}
    python compare.py --finetuned output/finetune_mini --metrics 'r_mean,cider*,accuracy,top1'
    python compare.py --nm output/nm_table/results
    python compare.py --quality output/quality
    python compare.py --pruned pruned_weights
    python compare.py --records output/records
    python compare.py --tradeoff output/tradeoff

One pass over the calibration data of a seed serves all pruners that need the same statistic, at all sparsities. The
runs are in <output_dir>/results.csv, a row as soon as each is done; the same command again only does what is missing.
Means and standard errors over the seeds are in table.md and table.tex.

--finetuned, --nm and --quality only put finished runs beside each other, and write FOLDER/table.md, of
FOLDER/<run>/<dense or sparsity>/result/metrics.json of the fine-tuning scripts, FOLDER/<method>/<seed>.json of
scripts/nm_table.sh, or FOLDER/<study>/<plan>/results.csv of scripts/quality.sh; --pruned writes FOLDER/report.html, one
file with tables and pictures of the runs of prune.py; --records, --tradeoff: the tables of scripts of these names.
"""

import argparse
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import models
import pruners
from configs.loading import configure
from configs.pruning import PRUNE_CONFIGS, PrunedModel
from engine.launch import launch, run, script
from engine.options import command_line as options
from engine.options.external import add_external_options, check_external
from engine.options.plans import plans_of
from sparsity.allocation.budget import parse_sparsities
from sparsity.files import check_writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    only = f"comma separated list of {pruners.listed()} (default: all of one pass at most), or of plans of --plans"
    add("-p", "--pruners", help=only)
    add("--plans", type=Path, metavar="FILE", help="YAML, {name: {pruner: NAME, pattern: '2:4', ...}} (default: none)")
    add("--pattern", help="N:M of all plans, instead of sparsities, or blockRxC (default: unstructured)")
    known = ", ".join((*models.NAMES, models.ANY))
    add("-m", "--model", metavar="MODEL", help=f"{known} (default: none, with a folder of finished runs)")
    add("-s", "--sparsities", default="63,75,90", help="comma separated list (default: %(default)s)")
    add("--seeds", type=options.seeds, default="42,43,44", help="comma separated list (default: %(default)s)")
    add("--num_batches", type=options.positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add("--k_test", type=options.count, default=0, help="candidates that are re-ranked; 0: none (default: %(default)s)")
    options.add_pruner_options(parser)
    add("--output_dir", type=Path, default=Path("comparison"), help="default: ./%(default)s")
    add("--int8", action="store_true", help="the dense model with weights rounded to 8 bits, too (default: no)")
    options.add_finished_options(add)
    options.add_config_options(parser, "prune")
    add_external_options(parser, models.ANY, evaluates=True)
    options.add_one_device(parser)
    args = parser.parse_args(arguments)
    args.plan = options.plan_options(parser, arguments)
    options.check_finished(parser, args)
    return args


def check(args: argparse.Namespace) -> PrunedModel:
    """Everything that can be refused before heavy imports; also resolves pruners, sparsities and configuration."""
    if args.pruners is not None:
        args.pruners = list(dict.fromkeys(name.strip() for name in args.pruners.split(",")))
        for name in [] if args.plans else args.pruners:
            pruners.check(name)
    check_external(args, models.kind(args.model) == "external", models.NAMES, models.ANY)
    args.sparsities = list(dict.fromkeys(parse_sparsities(args.sparsities)))
    args.config, config = configure(args, "prune", PRUNE_CONFIGS[models.kind(args.model)])
    config.check(str(args.config), evaluate=True)
    check_writable(args.output_dir, "--output_dir")
    return config.reranking(args.k_test)


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.model is None:
        from engine.finished.tables import finished_table

        print(finished_table(args))
        return
    config, usual = check(args), partial(filter, pruners.one_shot, pruners.available())
    own, build = (partial(each, sparsities=args.sparsities) for each in (pruners.own_options, pruners.build))
    files = plans_of(args.plans, args.pruners, usual, args.plan, args.pattern, own)
    engines = {name: file.build(name, build) for name, file in files.items()}
    if any(engine.plan.statistics for engine in engines.values()):
        config.check_calibration(str(args.config))

    from datasets.calibration.data_kinds import clear_skipped
    from engine.pruning.comparison import Entry, Ledger, compare, digests, summarise, wanted, write_tables
    from engine.pruning.data_kinds import SUBJECTS
    from engine.pruning.run import calibrations, preflight, save_arguments
    from engine.ranks import place_of

    chosen = {name: Entry(engines[name], file.pattern, file.groups) for name, file in files.items()}
    subject = SUBJECTS[models.kind(args.model)](models.find(args.model), config)
    fabric = launch(args, args.output_dir)
    view, file = subject.load(fabric), args.output_dir / "results.csv"
    if not file.is_file():  # else it goes on
        clear_skipped(args.output_dir, place_of(fabric))
    digest, evaluate = digests(view, subject.sizes, config, vars(args), chosen), subject.evaluation(args.output_dir)
    ledger = Ledger(file, args.model, view.groups, subject.metrics, digest)
    save_arguments(vars(args), config, args.output_dir)

    data = lru_cache(maxsize=1)(partial(subject.calibration, args.output_dir, args.num_batches))

    def passes(name: str, seed: int) -> Any:
        own = data(seed) if engines[name].plan.statistics else None
        return calibrations(own, fabric, seed, name, args.output_dir, config, args.capture_budget)

    for entry in chosen.values():
        own = data(args.seeds[0]) if entry.plan.statistics else None
        preflight(entry.engine, view, entry.request(args.sparsities, 0), own, args.output_dir, args.devices)
    asked = chosen, args.sparsities, args.seeds
    compare(view, *asked, ledger, calibrations=passes, evaluate=evaluate, int8=args.int8)
    rows = summarise(ledger, wanted(*asked, args.int8))
    facts = {"weights": config.weights, "num_batches": args.num_batches, **config.evaluated}
    print(write_tables(args.output_dir, args.model, facts | {"seeds": ", ".join(map(str, args.seeds))}, rows))


if __name__ == "__main__":
    run(main)
