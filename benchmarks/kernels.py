"""Sparse kernels against the dense layer on the CPU, for the layers of ViT-B: CSR with zeros anywhere, and blocks of
4 x 4 and 16 x 16. In turns, medians; how many times as fast as dense float32.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels --threads 1 --clock cpu
    python -m benchmarks.kernels --images 8 --threads 2
"""

import argparse

import torch
from torch import nn

from engine.deployment.measure import CLOCKS, Variant, measure, quartiles
from sparsity.kernels.linear import SparseLinear
from sparsity.pattern import Block

TOKENS = 197
SHAPES = {"attention": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
KERNELS = {"CSR": None, "4 x 4": Block(4, 4), "16 x 16": Block(16, 16)}
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


def zeros(weight: torch.Tensor, sparsity: float, block: Block | None) -> torch.Tensor:
    """Return a weight (out, in) of which this share is zero at random, in blocks or anywhere."""
    unit = block or Block(1, 1)
    kept = torch.rand(weight.shape[0] // unit.rows, weight.shape[1] // unit.columns) >= sparsity
    return weight * unit.expand(kept)


def measured(dense: nn.Linear, images: int, rounds: int, clock: str) -> dict[str, float]:
    """Return "dense", or kernel and sparsity -> median of the seconds of a layer."""
    weight, bias = dense.weight.detach(), dense.bias.detach()
    inputs = torch.randn(images, TOKENS, weight.shape[1])
    layers: dict[str, nn.Module] = {"dense": dense}
    for kernel, block in KERNELS.items():
        for sparsity in SPARSITIES:
            layers[f"{kernel} {sparsity}"] = SparseLinear(zeros(weight, sparsity, block), bias, block)
    variants = [Variant(label, lambda _, layer=layer: layer(inputs)) for label, layer in layers.items()]
    measure(variants, [images], rounds, CLOCKS[clock])
    return {each.name: quartiles(each.seconds[images])[1] for each in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="of 197 tokens each (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as torch chooses")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    columns = ["layer", "images", "dense ms", "kernel", *(f"{100 * each:g} %" for each in SPARSITIES)]
    rule = "|---|" + "--:|" * (len(columns) - 1)
    print(f"{args.threads} threads, {args.clock} clock\n\n| {' | '.join(columns)} |\n{rule}", flush=True)
    for name, (rows, inside) in SHAPES.items():
        for images in args.images:
            medians = measured(nn.Linear(inside, rows), images, args.rounds, args.clock)
            for kernel in KERNELS:
                gains = " | ".join(f"{medians['dense'] / medians[f'{kernel} {s}']:.2f}" for s in SPARSITIES)
                shape = f"{name} {rows} x {inside}"
                print(f"| {shape} | {images} | {1000 * medians['dense']:.1f} | {kernel} | {gains} |", flush=True)


if __name__ == "__main__":
    main()
