"""Prune a vision-language model once, at several sparsities, without training.

    python prune.py -m xvlm -p multiflow -s 63,75 --evaluate
    python prune.py -m xvlm -p wanda --reconstruct sparsegpt --pattern 2:4
    python prune.py -m xvlm -p wanda --allocation error:output -s 75 --save_allocation errors.yaml
    python prune.py -m xvlm --variant base --check_data
    python prune.py -m timm:vit_base_patch16_224 -p lamp --save_model
    python prune.py -m dino -p sparsegpt --reconstruct lsq -s 90 --recover 1000 --evaluate

Masks, run times and a report are written to <output_dir>/<pruner>/.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import models
import pruners
from configs.loading import configure
from configs.pruning import PRUNE_CONFIGS, PrunedModel
from engine.launch import launch, run, script
from engine.options import command_line as options
from engine.options.external import add_external_options, check_external
from engine.options.recovery import add_recovery_options, recovery_options
from sparsity.errors import UserError
from sparsity.files import check_writable
from sparsity.run.request import Request

SPARSITIES = "63,75,90"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__, "prune")
    add = parser.add_argument_group("model, method and sparsity").add_argument
    add("-p", "--pruner", metavar="PRUNER", help=pruners.listed())
    add("-m", "--model", required=True, metavar="MODEL", help=", ".join((*models.NAMES, models.ANY)))
    add("-s", "--sparsities", help=f"comma separated list of sparsities to prune at (default: {SPARSITIES})")
    add("--num_batches", type=options.positive_int, default=3000, help="calibration batches (default: %(default)s)")
    options.add_targets(add)
    add = parser.add_argument_group("results").add_argument
    add("--output_dir", type=Path, default=Path("pruned_weights"), help="default: ./%(default)s")
    add("--evaluate", action="store_true", help="measure quality, dense and at every sparsity (default: no)")
    add("--save_scores", action="store_true", help="write the pruner's scores (default: no)")
    add("--save_model", action="store_true", help="write the pruned model at every sparsity, too (default: no)")
    add("--check_data", action="store_true", help="only list what would be read, and what is missing (default: no)")
    options.add_pruner_options(parser)
    options.add_config_options(parser, "prune")
    add_external_options(parser, models.ANY)
    add_recovery_options(parser)
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
    options.resolve_targets(args, SPARSITIES)
    recovery_options(args)
    args.config, config = configure(args, "prune", PRUNE_CONFIGS[models.kind(args.model)])
    config.check(str(args.config), args.evaluate)
    check_writable(args.output_dir / args.pruner, "--output_dir")
    return config


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    check_external(args, models.kind(args.model) == "external", models.NAMES, models.ANY)
    if args.check_data:
        sys.exit(0 if list_data(args) else 1)
    config = check(args)
    engine = pruners.build(args.pruner, pattern=args.pattern, sparsities=args.sparsities or (), **args.plan)
    request = Request.of(args.sparsities or (), args.pattern, args.seed, args.group_sparsity)
    engine.plan.check(request)
    if args.save_scores and not engine.plan.scored:
        raise UserError(f"--save_scores: {args.pruner} has no scores that serve all sparsities; leave it out")
    if engine.plan.statistics or args.recover:
        config.check_calibration(str(args.config))

    from datasets.calibration.data_kinds import clear_skipped
    from engine.pruning.data_kinds import SUBJECTS
    from engine.pruning.run import Results, calibrations, preflight, timed
    from engine.pruning.start import load_start
    from engine.ranks import place_of
    from engine.recovery.recovery import build_recovery

    subject, folder = SUBJECTS[models.kind(args.model)](models.find(args.model), config), args.output_dir / args.pruner
    fabric = launch(args, folder, unused_parameters=bool(args.recover))
    view = subject.load(fabric)
    request = replace(request, start=load_start(view, args.from_mask, args.from_weights))
    clear_skipped(folder, place_of(fabric))
    data = subject.calibration(folder, args.num_batches, args.seed) if engine.plan.statistics or args.recover else None
    free = preflight(engine, view, request, data, folder, args.devices)
    evaluate = subject.evaluation(folder) if args.evaluate else None
    results = Results(folder, view, vars(args), config, subject.metrics, fabric)
    results.recovery = build_recovery(args, fabric, view, data, config, free)
    if evaluate:
        results.dense(evaluate())
    passes = calibrations(data, fabric, args.seed, args.pruner, folder, config, args.capture_budget)
    with results.calibration(data):
        measured = engine.measure(view, passes(0), request)
    results.pictures.sensitivity = measured.sensitivity
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
