"""Prune a vision-language model once, at several sparsities, without training.

    python prune.py -m xvlm -p multiflow
    python prune.py -m xvlm -p omp -s 50,75 --pool layer --evaluate
    python prune.py -m xvlm -p wanda --reconstruct sparsegpt --pattern 2:4
    python prune.py -m xvlm --variant base --check_data
    python prune.py -m timm:vit_base_patch16_224 -p lamp --save_model

Masks, run times and a report are written to <output_dir>/<pruner>/.
"""

import argparse
import sys
from pathlib import Path

import models
import pruners
from configs.loading import configure, read_yaml
from configs.pruning import PRUNE_CONFIGS, PrunedModel
from engine.launch import launch, run, script
from engine.options import command_line as options
from sparsity.allocation.budget import parse_sparsities
from sparsity.errors import UserError
from sparsity.files import check_writable
from sparsity.pattern import NM, pattern_of
from sparsity.run.request import Request

SPARSITIES = "63,75,90"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("-p", "--pruner", metavar="PRUNER", help=pruners.listed())
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join((*models.NAMES, models.ANY)))
    add("-s", "--sparsities", help=f"comma separated list of sparsities to prune at (default: {SPARSITIES})")
    add("--num_batches", type=options.positive_int, default=3000, help="calibration batches (default: %(default)s)")
    add("--output_dir", type=Path, default=Path("pruned_weights"), help="default: ./%(default)s")
    options.add_targets(add)
    add("--evaluate", action="store_true", help="measure quality, dense and at every sparsity (default: no)")
    add("--save_scores", action="store_true", help="write the pruner's scores (default: no)")
    add("--save_model", action="store_true", help="write the pruned model at every sparsity, too (default: no)")
    add("--check_data", action="store_true", help="only list what would be read, and what is missing (default: no)")
    options.add_pruner_options(parser)
    options.add_config_options(parser, "prune")
    options.add_external_options(parser, models.ANY)
    options.add_device_options(parser)
    args = parser.parse_args(arguments)
    args.plan = options.plan_options(parser, arguments)
    if not (args.pruner or args.check_data):
        parser.error("the following arguments are required: -p/--pruner")
    return args


def list_data(args: argparse.Namespace) -> bool:
    """Print what the configuration reads; whether all of it is there."""
    from engine.reports.data_check import check_data, table

    kind = models.kind(args.model)
    path, config = configure(args, "prune", PRUNE_CONFIGS[kind])
    findings = check_data(config, regions=kind != "pairs" or models.find(args.model).REGIONS)
    print(path or args.model, table(findings), sep="\n")
    return all(finding.ok for finding in findings)


def check(args: argparse.Namespace) -> PrunedModel:
    """Everything that can be refused before heavy imports; also resolves sparsities, pattern and configuration."""
    pruners.check(args.pruner)
    args.pattern = pattern_of(args.pattern)
    decided = isinstance(args.pattern, NM)
    for option in ("sparsities", "pool", "allocation", "scope"):
        if decided and getattr(args, option) is not None:
            raise UserError(f"--pattern decides which weights are pruned and how many: leave --{option} out")
    args.sparsities = None if decided else parse_sparsities(SPARSITIES if args.sparsities is None else args.sparsities)
    args.config, config = configure(args, "prune", PRUNE_CONFIGS[models.kind(args.model)])
    if config.model_config:
        read_yaml(config.model_config)
    config.check_weights()
    if args.evaluate:
        config.check_evaluation(str(args.config))
    check_writable(args.output_dir / args.pruner, "--output_dir")
    return config


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    options.check_external(args, models.kind(args.model) == "external", models.NAMES, models.ANY)
    if args.check_data:
        sys.exit(0 if list_data(args) else 1)
    config = check(args)
    engine = pruners.build(args.pruner, pattern=args.pattern, sparsities=args.sparsities or (), **args.plan)
    request = Request.of(args.sparsities or (), args.pattern, args.seed, args.group_sparsity)
    engine.plan.check(request)
    if args.save_scores and not engine.plan.scored:
        raise UserError(f"--save_scores: {args.pruner} has no scores that serve all sparsities; leave it out")
    if engine.plan.statistics:
        config.check_calibration(str(args.config))

    from datasets.calibration.data_kinds import clear_skipped
    from engine.pruning.data_kinds import SUBJECTS
    from engine.pruning.run import Results, calibrations, preflight, timed
    from engine.ranks import place_of

    subject, folder = SUBJECTS[models.kind(args.model)](models.find(args.model), config), args.output_dir / args.pruner
    fabric = launch(args, folder)
    view = subject.load(fabric)
    clear_skipped(folder, place_of(fabric))
    results = Results(folder, view, vars(args), config, subject.metrics, writes=fabric.is_global_zero)
    data = subject.calibration(folder, args.num_batches, args.seed) if engine.plan.statistics else None
    preflight(engine, view, request, data, folder, args.devices)
    evaluate = subject.evaluation(folder) if args.evaluate else None
    if evaluate:
        results.dense(evaluate())
    passes = calibrations(data, fabric, args.seed, args.pruner, folder, config, args.capture_budget)
    with results.calibration():
        measured = engine.measure(view, passes(0), request)
    for sparsity, chosen, seconds in timed(engine.masks(view, measured, request, passes), engine.plan.one_pass):
        results.add(sparsity, chosen, seconds, evaluate)
    if args.save_scores:
        results.save_scores(engine.scores(view, measured, seed=args.seed))
    summary = results.finish()
    if fabric.is_global_zero:
        print(summary)
    fabric.barrier()


if __name__ == "__main__":
    run(main)
