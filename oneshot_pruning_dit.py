"""Prune the linear layers of a diffusion transformer, to N:M or any sparsity, and draw with what is left.

    python oneshot_pruning_dit.py --pruner wanda                            # the bundled dit-mini, to 2:4
    python oneshot_pruning_dit.py --pruner sparsegpt --enable-update --save-model output/dit.sparsegpt24.safetensors
    python oneshot_pruning_dit.py --model DiT-XL/2 --vae stabilityai/sd-vae-ft-ema    # the official weights

Calibrated on samples with noise at random times, of random classes: the bundled glyphs, --data-path (latents that
sample.py wrote), or what the dense model draws itself. In --output-dir: pruned weights, mask, picture of samples, and
for dit-mini their Frechet distance from the glyphs, a row of results.csv.
"""

import argparse
import time
from pathlib import Path

import pruners
from configs.pruning import NoiseEvaluation, NoisePruneConfig
from engine.launch import launch, run
from engine.options.command_line import Parser, add_one_device, count, positive_float, positive_int, seed
from engine.options.diffusion import add_generator_options, choose
from engine.options.oneshot import PRUNERS, Target, add_oneshot_options, check_oneshot, plan_of
from models.dit import sizes as dit_sizes
from sparsity.errors import UserError
from sparsity.files import check_writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_one_device(parser)
    add_generator_options(parser)
    add_oneshot_options(parser, nsamples=1024)
    add = parser.add_argument
    add("--batch-size", type=positive_int, default=16, help="of calibration, at most (default: %(default)s)")
    add("--data-path", default="", help="file of latents to calibrate on; default: see above")
    add("--num-samples", type=positive_int, default=64, help="in the picture (default: %(default)s)")
    add("--num-sampling-steps", type=positive_int, default=50, help="of the picture (default: %(default)s)")
    add("--cfg-scale", type=positive_float, default=2.0, help="of the picture (default: %(default)s)")
    frechet = "samples of dit-mini that are compared with glyphs; 0: none (default: %(default)s)"
    add("--frechet-samples", type=count, default=500, help=frechet)
    add("--seed", type=seed, default=0, help="of all randomness (default: %(default)s)")
    add("--output-dir", type=Path, default=Path("output/oneshot_dit"), help="default: %(default)s")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> tuple[dit_sizes.Config, NoisePruneConfig, Target]:
    """Everything that can be refused before heavy imports: sizes, what is read, and what is to be zero."""
    target = check_oneshot(args)
    check_writable(args.output_dir, "--output-dir")
    if not 2 <= args.num_sampling_steps <= 1000:
        raise UserError(f"--num-sampling-steps must be from 2 to 1000, got {args.num_sampling_steps}")
    sizes, weights = choose(args, dit_sizes)  # after what is checked at once: it may download them
    bundled = sizes.pixels and not args.data_path
    config = NoisePruneConfig(
        model_config="",
        weights=weights or "random",
        bundled=bundled,
        latents=args.data_path,
        batch_size=whole_batches(args.nsamples, args.batch_size),
        workers=0,
        evaluation=NoiseEvaluation(samples=args.frechet_samples if bundled else 0),
    )
    config.check_calibration("--data-path")
    return sizes, config, target


def whole_batches(samples: int, most: int) -> int:
    """The largest batch, of at most `most`, in which so many samples can be read without a rest."""
    return next(size for size in range(min(most, samples), 0, -1) if samples % size == 0)


def name_of(model: str) -> str:
    """A model as names of files begin: DiT-XL-2, or a file's own name."""
    return Path(model).stem if model.endswith((".yaml", ".yml")) else model.replace("/", "-")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sizes, config, target = check(args)

    from datasets.bundled.generation import labels_of
    from engine.generation.sampling import draw
    from engine.generation.vae import VAE, write_samples
    from engine.pruning.data_kinds import Noise
    from engine.pruning.oneshot import one_shot, preflight, save
    from engine.reports.report import append_csv, markdown_table
    from models.dit import model as dit

    fabric, subject, masks = launch(args), Noise(dit, config, sizes), None
    vae = VAE(args.vae, fabric) if args.vae else None
    view = subject.load(fabric, ema=not args.no_ema)
    label = args.pruner + "_update" * args.enable_update
    stem = f"{name_of(args.model)}_{label}" + f"_{target.stem}" * (args.pruner != "dense")
    begin = time.perf_counter()
    if PRUNERS[args.pruner]:
        name = PRUNERS[args.pruner]
        pruner = pruners.build(name, **plan_of(args, target))
        preflight(pruner, view, target, args.seed)
        batches = args.nsamples // config.batch_size
        data = subject.calibration(args.output_dir, batches, args.seed) if pruner.plan.statistics else None
        masks = one_shot(pruner, view, data, fabric, target, args.seed, folder=args.output_dir, config=config)
        masks.apply(view)
    row = {"model": args.model, "pruner": label, "pattern": str(target) if masks else "-", "seed": args.seed}
    row |= {"sparsity %": f"{100 * masks.report(view).overall.sparsity if masks else 0:.2f}"}
    row |= {"seconds": f"{time.perf_counter() - begin:.1f}"}
    written = save(subject.model, args.save_model or args.output_dir / f"{stem}.safetensors", masks)
    labels = labels_of(None, args.num_samples, sizes)
    how = {"steps": args.num_sampling_steps, "scale": args.cfg_scale, "seed": args.seed}
    samples = draw(subject.model, labels, fabric, **how)
    told = write_samples(args.output_dir / f"{stem}_samples.png", samples, labels, sizes.pixels, vae)
    if config.evaluation.samples:
        measured = subject.evaluation(args.output_dir)()
        row |= {column: f"{measured[key]:.2f}" for column, key in subject.metrics.items()}
    append_csv(args.output_dir / "results.csv", [row])
    print(markdown_table([row]), *written, told, args.output_dir / "results.csv", sep="\n")


if __name__ == "__main__":
    run(main)
