"""Choosing which weights go at one sparsity: ours against torch.cat + torch.kthvalue, on random magnitudes in layers of
ViT-B's size.

    python -m benchmarks.selection                  # 1.8e8 weights: 4 GB of memory, about two minutes on two cores
    python -m benchmarks.selection --numel 1e7
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsity.allocation.budget import budget
from sparsity.selection import keep, thresholds


def ours(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    (threshold,) = thresholds(scores, [count])
    return dict(keep(scores, threshold))


def concatenated(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    value = torch.cat([score.flatten() for score in scores.values()]).kthvalue(count).values
    return {name: score > value for name, score in scores.items()}


def timed(
    select: Callable[[dict[str, Tensor], int], dict[str, Tensor]], scores: dict[str, Tensor], count: int
) -> tuple[float, int]:
    """Seconds, and how many weights go."""
    start = time.perf_counter()
    masks = select(scores, count)
    seconds = time.perf_counter() - start
    return seconds, sum(mask.numel() - int(mask.sum()) for mask in masks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=float, default=1.8e8, help="weights in all")
    parser.add_argument("--sparsity", default="0.63", help="fraction that goes")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, interleaved; medians are printed")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    scores, total = {}, 0
    while total < args.numel:
        scores[str(len(scores))] = torch.randn(shapes[len(scores) % len(shapes)], generator=generator).abs_()
        total += scores[str(len(scores) - 1)].numel()
    count = budget(args.sparsity, total)
    seconds: dict[str, list[float]] = {"ours": [], "cat + kthvalue": []}
    for _ in range(args.repeats):
        for label, select in (("ours", ours), ("cat + kthvalue", concatenated)):
            elapsed, pruned = timed(select, scores, count)
            seconds[label].append(elapsed)
            print(f"  {label}: {elapsed:.2f} s, {pruned - count:+d} weights from the {count} asked for")
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    print(f"{total} weights, {len(scores)} layers, {torch.get_num_threads()} threads, medians of {args.repeats}:")
    for label, median in medians.items():
        print(f"  {label}: {median:.2f} s")
    print(f"  ratio: {medians['ours'] / medians['cat + kthvalue']:.2f}")


if __name__ == "__main__":
    main()
