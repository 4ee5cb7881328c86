"""Draw class-conditional samples with a diffusion transformer, dense or pruned.

    python sample.py                                              # the bundled dit-mini
    python sample.py --mask MASK --class-labels food-fruit,clothing --num-samples 32
    python sample.py --model DiT-XL/2 --vae stabilityai/sd-vae-ft-ema    # the official weights
    python sample.py --model DiT-XL/2 --ckpt pruned.safetensors --num-sampling-steps 50 --sampler ddim --cfg-scale 1.5

Without --vae, latents are saved in place of images; oneshot_pruning_dit.py takes them as calibration data.
"""

import argparse
import time
from pathlib import Path

from engine.launch import launch, run
from engine.options.command_line import Parser, add_one_device, positive_float, positive_int, seed
from engine.options.diffusion import add_generator_options, choose
from models.dit import sizes as dit_sizes
from sparsity.errors import MissingFileError, UserError
from sparsity.files import check_writable

PAPER = (207, 360, 387, 974, 88, 979, 417, 279)  # the classes of ImageNet that the official script draws


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_one_device(parser)
    add_generator_options(parser)
    add = parser.add_argument
    add("--mask", type=Path, help="mask file; default: none")
    add("--num-samples", type=positive_int, help="default: one of each --class-labels; without, 64, of latents 8")
    add("--class-labels", help="comma separated numbers, or names of bundled classes; default: evenly over all")
    add("--cfg-scale", type=positive_float, help="of the guidance, 1: none (default: 2, of latents 4)")
    add("--num-sampling-steps", type=positive_int, help="of at most 1000 (default: 50, of latents 250)")
    add("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default: %(default)s")
    add("--seed", type=seed, default=0, help="default: %(default)s")
    add("--output", type=Path, default=Path("sample.png"), help="picture of all samples (default: %(default)s)")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> tuple[dit_sizes.Config, str | None]:
    """Everything that can be refused before heavy imports; also resolves the defaults that follow from the model."""
    if args.num_sampling_steps is not None and not 2 <= args.num_sampling_steps <= 1000:
        raise UserError(f"--num-sampling-steps must be from 2 to 1000, got {args.num_sampling_steps}")
    if args.mask and not args.mask.is_file():
        raise MissingFileError(f"--mask {args.mask}: there is no such file")
    check_writable(args.output.parent, "--output")
    sizes, weights = choose(args, dit_sizes)  # last: it may download them
    args.cfg_scale = args.cfg_scale or (2.0 if sizes.pixels else 4.0)
    args.num_sampling_steps = args.num_sampling_steps or (50 if sizes.pixels else 250)
    return sizes, weights


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    sizes, weights = check(args)

    from datasets.bundled.generation import labels_of
    from engine.generation.sampling import draw
    from engine.generation.vae import VAE, write_samples
    from engine.updated_weights import warn_of_updates
    from models.dit import model as dit
    from sparsity.masks import Masks

    labels = labels_of(args.class_labels, args.num_samples, sizes, PAPER if sizes.classes == 1000 else ())
    fabric = launch(args)
    vae = VAE(args.vae, fabric) if args.vae else None
    model = dit.build(sizes, weights, ema=not args.no_ema).to(fabric.device)
    facts = [f"{args.model} with {weights or 'random weights'}"]
    if args.mask:
        masks, view = Masks.load(args.mask), dit.prunable_view(model)
        warn_of_updates(masks, view, args.mask)
        masks.apply(view)
        facts.append(
            f"{100 * masks.report(view).overall.sparsity:.4g} % of its prunable weights are zero ({args.mask})"
        )
    begin = time.perf_counter()
    how = {"sampler": args.sampler, "steps": args.num_sampling_steps, "scale": args.cfg_scale, "seed": args.seed}
    samples = draw(model, labels, fabric, **how)
    where = write_samples(args.output, samples, labels, sizes.pixels, vae)
    drawn = f"{len(labels)} samples of {len(set(labels))} classes by {args.sampler} in {args.num_sampling_steps} steps"
    facts.append(f"{drawn}, guidance {args.cfg_scale:g}, seed {args.seed}, {time.perf_counter() - begin:.1f} s")
    print(*facts, where, sep="\n")


if __name__ == "__main__":
    run(main)
