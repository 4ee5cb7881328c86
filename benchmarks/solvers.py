"""The reconstructions on layers of ViT-S and ViT-B, end to end with the statistics that each needs, against SparseGPT's
joint sweep: least squares and ADMM after a mask by Wanda's score, ALPS and ADMM with a mask of their own; least squares
and ALPS towards half of the dense model's output, too. Interleaved, medians; and the relative error of each towards its
own target.

    OMP_NUM_THREADS=1 python -m benchmarks.solvers             # ViT-B, about two minutes
    OMP_NUM_THREADS=1 python -m benchmarks.solvers --full      # all statistics over 512 images, three runs

Statistics take time in proportion to the images, solvers take the same for any number of them. So by default a few
images are measured, and the seconds of the statistics counted as of 512.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.sparsegpt import CLOCKS, TOKENS, WIDTHS, inputs, our_hessian, shapes, timed
from sparsity.pattern import NM, parse_pattern
from sparsity.reconstruction.admm import ADMM
from sparsity.reconstruction.alps import ALPS
from sparsity.reconstruction.base import Problem, Reconstruction
from sparsity.reconstruction.equations import relative_error
from sparsity.reconstruction.lsq import LeastSquares
from sparsity.reconstruction.projection import project
from sparsity.reconstruction.sparsegpt import SparseGPT
from sparsity.statistics.hessian import triangle
from sparsity.statistics.sums import add

GOALS = {"lsq": 1.6, "alps": 4.0, "alps dense": 4.0}  # times SparseGPT's, end to end
DENSE = 0.5  # of the target that is the dense model's output
_PRUNED = 0.1  # how far the pruned model's inputs are from the dense model's, of their size
IMAGES = 512  # of a calibration
_DISTINCT = 4  # batches, which are read again and again: for the time it makes no difference
Solve = Callable[[Problem], tuple[Tensor, Tensor]]


def masked(solver: Reconstruction, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return mask and weights of a solver after a mask by |w| ||X_j||."""
    norms = triangle(problem.statistics["hessian"], problem.weight.shape[1]).diagonal().sqrt()
    kept = project(problem, problem.weight.abs() * norms.to(problem.weight))
    return solver.solve(replace(problem, kept=kept, sparsity=None))


def cross_products(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return X'Xh / n, (in, in), of the dense model's inputs X and the pruned one's Xh, as the engine adds it up."""
    total, seen = torch.zeros(batches[0][0].shape[1], batches[0][0].shape[1], dtype=torch.float64), 0
    for dense, pruned in batches:
        add(total, dense.t() @ pruned)
        seen += len(dense)
    return total.div_(seen)


SOLVERS: dict[str, Solve] = {
    "sparsegpt": SparseGPT().solve,
    "sweep": partial(masked, SparseGPT()),
    "lsq": partial(masked, LeastSquares()),
    "admm mask": partial(masked, ADMM()),
    "admm": ADMM().solve,
    "alps": ALPS().solve,
    "lsq dense": partial(masked, LeastSquares()),
    "alps dense": ALPS().solve,
}


def statistics_of(solver: str) -> tuple[str, ...]:
    """Return the statistics that a solver needs."""
    return ("hessian", "cross") if solver.endswith("dense") else ("hessian",)


def measure(
    clock: Callable[[], float],
    shape: tuple[int, int],
    images: int,
    batch: int,
    repeats: int,
    pattern: NM | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return solver or statistic -> median of its seconds, and solver -> relative error, of one layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.02
    number = max(1, images // batch)
    drawn = inputs(batch * min(_DISTINCT, number), shape[1], generator).split(batch * TOKENS)
    moved = [(rows, rows + _PRUNED * inputs(batch, shape[1], generator)) for rows in drawn]
    pairs = [moved[i % len(moved)] for i in range(number)]
    batches = [pruned for _, pruned in pairs]
    seconds: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        elapsed, hessian = timed(clock, our_hessian, batches)
        seconds.setdefault("hessian", []).append(elapsed)
        elapsed, cross = timed(clock, cross_products, pairs)
        seconds.setdefault("cross", []).append(elapsed)
        found = {"hessian": hessian, "cross": cross, "dense_hessian": our_hessian([dense for dense, _ in moved])}
        same = Problem("layer", weight, found, None, "0.5", "block", pattern)
        for name, solve in SOLVERS.items():
            problem = replace(same, dense_share=DENSE) if "cross" in statistics_of(name) else same
            elapsed, (_, updated) = timed(clock, solve, problem)
            seconds.setdefault(name, []).append(elapsed)
            errors[name] = relative_error(problem, updated, 0.01)
    return {name: statistics.median(values) for name, values in seconds.items()}, errors


def report(label: str, total: dict[str, float], errors: dict[str, float] | None = None) -> None:
    """Print each solver's seconds, alone and with its statistics, these over SparseGPT's, and its error."""
    print(f"{label}: Gram matrix {total['hessian']:.3f} s, products with the dense inputs {total['cross']:.3f} s")
    ends = {name: total[name] + sum(total[statistic] for statistic in statistics_of(name)) for name in SOLVERS}
    for name, both in ends.items():
        theirs = ends["sparsegpt"]
        goal = f"   goal at most {GOALS[name]}" if name in GOALS else ""
        error = f"   error {errors[name]:.5f}" if errors else ""
        told = f"{total[name]:9.3f} s   end to end {both:9.3f} s, SparseGPT {theirs:9.3f} s: {both / theirs:5.2f} times"
        print(f"  {name:10} {told}{error}{goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=["vit_b"], help="default: vit_b")
    measured = f"images that are measured; their seconds count as of {IMAGES} (default: %(default)s)"
    parser.add_argument("--images", type=int, default=32, help=measured)
    parser.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each solver (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help=f"--images {IMAGES} --repeats 3 (default: no)")
    parser.add_argument("--pattern", default="2:4", help="N:M, or unstructured: half of each block (default: 2:4)")
    parser.add_argument("--layers", nargs="+", default=["qkv", "proj", "fc1", "fc2"], help="default: all of a block")
    clock = "cpu: of this process alone, for one thread on a machine that others use (default: %(default)s)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    args = parser.parse_args()
    if args.full:
        args.images, args.repeats = IMAGES, 3
    sizes = f"{args.images} images of {TOKENS} tokens, statistics counted as of {IMAGES}"
    print(f"{torch.get_num_threads()} threads, {sizes}, {args.pattern}", flush=True)
    for model in args.models:
        total: dict[str, float] = {}
        for layer in args.layers:
            shape = shapes(WIDTHS[model])[layer]
            pattern = parse_pattern(args.pattern)
            medians, errors = measure(CLOCKS[args.clock], shape, args.images, args.batch, args.repeats, pattern)
            for statistic in ("hessian", "cross"):
                medians[statistic] *= IMAGES / args.images
            report(f"{model} {layer} {shape}", medians, errors)
            for name, median in medians.items():
                total[name] = total.get(name, 0) + median
        report(model, total)


if __name__ == "__main__":
    main()
