"""Measure what pruning gives in bytes, time and memory: a model dense, with its zeros, packed, by sparse kernels, and
as ONNX in float32 and int8, side by side in one run.

    python benchmark.py -m dino --mask output/omp/dino_omp_90_seed42_pruning_masks.safetensors --evaluate
    python benchmark.py -m timm:vit_base_patch16_224 --weights random --mask MASK --batch_sizes 1,8 --threads 2
    python benchmark.py -m dino --weights pruned.safetensors --variants masked,accelerated

All variants take turns; medians and quartiles are given, and no ratio that the quartiles leave open. Results are
written to <output_dir>: speed.md, speed.csv, speed.png, and the files that were measured. docs/speed.md says what to
expect.
"""

import argparse

import models
from configs.pruning import PrunedModel
from engine.deployment.options import add_model_options, check_files, configured
from engine.launch import launch, run, script
from engine.options import command_line as options
from sparsity.errors import UserError

KINDS = ("dense", "masked", "packed", "accelerated", "onnx", "int8")


def sizes(text: str) -> list[int]:
    """argparse type: comma separated batch sizes, each once, ascending."""
    return sorted({options.positive_int(item) for item in text.split(",")})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--batch_sizes", type=sizes, default=[1, 8], help="comma separated (default: 1,8)")
    add("--rounds", type=options.positive_int, default=11, help="in which all variants take turns (default: 11)")
    clock = "cpu: of this process, for a CPU that others use too (default: %(default)s)"
    add("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    add("--threads", type=options.count, default=0, help="of the CPU (default: as torch chooses)")
    add(
        "--variants",
        type=options.among(KINDS, "variant"),
        default=list(KINDS),
        help=f"comma separated (default: {','.join(KINDS)})",
    )
    add("--evaluate", action="store_true", help="measure quality, too, where an evaluation exists (default: no)")
    add_model_options(parser, "output/benchmark", models.NAMES, models.ANY)
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> PrunedModel:
    """Everything that can be refused before heavy imports."""
    config = configured(args, models.kind(args.model), models.NAMES, models.ANY)
    check_files(args, config, "--variants", args.variants)
    if args.evaluate:
        config.check_evaluation(args.model)
    return config


@script
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config = check(args)

    import torch

    from engine.deployment.loading import masks_of, zeros_of
    from engine.deployment.measure import CLOCKS, measure
    from engine.deployment.report import write_speed
    from engine.deployment.variants import Model, Variants, by_column
    from engine.pruning.data_kinds import SUBJECTS
    from models.parts.graphs import graphs_of

    fabric = launch(args, args.output_dir)
    if args.threads:
        torch.set_num_threads(args.threads)

    def loaded(like: Model | None = None) -> Model:
        subject = SUBJECTS[models.kind(args.model)](models.find(args.model), config)
        view = subject.load(fabric)
        if like:  # random weights are drawn anew
            view.model.load_state_dict(like.view.model.state_dict())
        measured = by_column(subject.evaluation(args.output_dir), subject.metrics) if args.evaluate else None
        return Model(view, graphs_of(view.model), measured, models.kind(args.model) != "external")

    dense = loaded() if args.mask else None
    pruned = loaded(dense)
    if args.mask:
        masks_of(pruned.view, args.mask).apply(pruned.view)
    masks = zeros_of(pruned.view)
    threads, clock = args.threads or torch.get_num_threads(), CLOCKS[args.clock]
    built = Variants(dense, pruned, args.output_dir / "files", threads, clock)
    variants = built.build(args.variants)
    if not any(variant.run for variant in variants):
        raise UserError("--variants: there is nothing to run; dense needs --mask, packed runs as masked does")
    measure(variants, args.batch_sizes, args.rounds, clock)
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "CPU"
    facts = {"model": args.model, "mask": args.mask or "zeros of the weights", "device": device}
    facts |= {"sparsity": f"{100 * masks.report(pruned.view).overall.sparsity:.2f} % of the prunable weights"}
    facts |= {"threads": threads, "clock": args.clock, "rounds": args.rounds, "torch": torch.__version__}
    tables = "\n\n".join(f"Batch {b}:\n\n{built.tables[b]}" for b in args.batch_sizes if b in built.tables)
    print(write_speed(args.output_dir, f"Speed of {args.model}", facts, variants, args.batch_sizes, tables))
    print(f"\nreport: {args.output_dir / 'speed.md'}")


if __name__ == "__main__":
    run(main)
