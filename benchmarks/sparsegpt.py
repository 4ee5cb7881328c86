"""SparseGPT on layers of ViT-S and ViT-B, 2:4: ours against the plain formulation, column by column, with an inverse
and two more factorisations; and the accumulation of the Hessian against one bare matrix product of its shape.
Interleaved, medians.

    python -m benchmarks.sparsegpt                  # about a minute on two idle cores
    python -m benchmarks.sparsegpt --models vit_s --images 64 --repeats 1
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsity.pattern import NM
from sparsity.reconstruction.sparsegpt import reconstruct, saliency
from sparsity.statistics.hessian import DAMPING, Factor, factor, gram
from sparsity.statistics.sums import add

GOALS = {"total": 2.5, "mask": 4.0, "product": 1.2}  # times as fast; times as slow as one product
TOKENS = 197  # of an image of 224 x 224 in patches of 16
PLAIN_BLOCK = 128
PATTERN = NM(2, 4)
WIDTHS = {"vit_s": 384, "vit_b": 768}


def shapes(width: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers of a block."""
    return {"qkv": (3 * width, width), "proj": (width, width), "fc1": (4 * width, width), "fc2": (width, 4 * width)}


def inputs(images: int, width: int, generator: torch.Generator) -> Tensor:
    """Correlated features of different size, (images * TOKENS, in)."""
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    scale = torch.rand(width, generator=generator) + 0.1
    return (torch.randn(images * TOKENS, width, generator=generator) @ mix).mul_(scale)


# Plain, as published


def plain_hessian(batches: list[Tensor]) -> Tensor:
    total, seen = torch.zeros(batches[0].shape[1], batches[0].shape[1]), 0
    for rows in batches:
        total *= seen / (seen + len(rows))
        seen += len(rows)
        scaled = (2 / seen) ** 0.5 * rows.t()
        total += scaled.matmul(scaled.t())
    return total


def plain_factor(hessian: Tensor, width: int) -> Tensor:
    hessian = hessian.clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def plain_mask(weight: Tensor, upper: Tensor, update: bool) -> tuple[Tensor, Tensor]:
    """Kept, and the weights, column by column in blocks of PLAIN_BLOCK."""
    weight, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], PLAIN_BLOCK):
        stop = min(start + PLAIN_BLOCK, weight.shape[1])
        block, result = weight[:, start:stop].clone(), torch.zeros_like(weight[:, start:stop])
        errors, local = torch.zeros_like(block), upper[start:stop, start:stop]
        gone = torch.zeros_like(block, dtype=torch.bool)
        for j in range(stop - start):
            column, pivot = block[:, j], local[j, j]
            if j % PATTERN.m == 0:
                part = block[:, j : j + PATTERN.m] ** 2 / local.diagonal()[j : j + PATTERN.m].reshape(1, -1) ** 2
                lowest = torch.topk(part, PATTERN.m - PATTERN.n, dim=1, largest=False)[1]
                gone.scatter_(1, j + lowest, True)
            q = column.clone()
            q[gone[:, j]] = 0
            result[:, j] = q
            error = (column - q) / pivot
            if update:
                block[:, j:] -= error.unsqueeze(1).matmul(local[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:stop], kept[:, start:stop] = result, ~gone
        if update:
            weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return kept, weight


# Ours


def our_hessian(batches: list[Tensor]) -> Tensor:
    """As sparsity.statistics.inputs adds up."""
    total, seen = gram(batches[0][:0]).double(), 0
    for rows in batches:
        add(total, gram(rows))
        seen += len(rows)
    return total.mul_(2 / seen)


def our_factor(hessian: Tensor, width: int) -> Factor:
    return factor(hessian, width, "layer")


def our_mask(weight: Tensor, found: Factor, update: bool) -> tuple[Tensor, Tensor]:
    if update:
        return reconstruct(weight, found, None, PATTERN)
    kept = PATTERN.keep(saliency(weight, found))
    return kept, weight * kept


SIDES: dict[str, tuple[Callable[..., Any], ...]] = {
    "ours": (our_hessian, our_factor, our_mask),
    "plain": (plain_hessian, plain_factor, plain_mask),
}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(clock: Callable[[], float], function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = clock()
    result = function(*arguments)
    return clock() - start, result


def measure(
    clock: Callable[[], float], shape: tuple[int, int], images: int, batch: int, repeats: int
) -> dict[str, float]:
    """Phase and side -> median of its seconds, of one layer; prints how far the masks agree."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(shape, generator=generator), inputs(images, shape[1], generator)
    batches = list(rows.split(batch * TOKENS))
    seconds: dict[str, list[float]] = {}
    kept: dict[tuple[str, bool], Tensor] = {}

    def note(phase: str, side: str, elapsed: float) -> None:
        seconds.setdefault(f"{phase} {side}", []).append(elapsed)

    for _ in range(repeats):
        note("product", "bare", timed(clock, lambda: rows.t() @ rows)[0])
        for side, (accumulate, factorise, choose) in SIDES.items():
            elapsed, hessian = timed(clock, accumulate, batches)
            note("hessian", side, elapsed)
            elapsed, found = timed(clock, factorise, hessian, shape[1])
            note("factor", side, elapsed)
            for update in (False, True):
                elapsed, (kept[side, update], _) = timed(clock, choose, weight, found, update)
                note("update" if update else "mask", side, elapsed)
    for update in (False, True):
        alike = (kept["ours", update] == kept["plain", update]).double().mean()
        print(f"    same mask {'with' if update else 'without'} update: {100 * alike:.4f} %", flush=True)
    return {phase: statistics.median(values) for phase, values in seconds.items()}


def compare(name: str, total: dict[str, float]) -> None:
    """Prints phases and ratios of the sums over layers."""
    print(f"{name}: seconds, ours against plain")
    for phase in ("hessian", "factor", "mask", "update"):
        ours, plain = total[f"{phase} ours"], total[f"{phase} plain"]
        print(f"  {phase:8} {ours:8.3f} {plain:8.3f}   {plain / ours:6.2f} times as fast")
    for phase, label in (("mask", "without update"), ("update", "with update")):
        ours, plain = (sum(total[f"{part} {side}"] for part in ("hessian", "factor", phase)) for side in SIDES)
        print(f"  total {label}: {plain / ours:.2f} times as fast (goal {GOALS['total']})")
        print(f"  mask phase {label}: {total[f'{phase} plain'] / total[f'{phase} ours']:.2f} (goal {GOALS['mask']})")
    bare = total["hessian ours"] / total["product bare"]
    print(f"  Hessian against one product: {bare:.2f} times its time (goal at most {GOALS['product']})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS), help="default: both")
    parser.add_argument("--images", type=int, default=16, help="calibration images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    clock = "cpu: of this process alone, for one thread on a machine that others use (default: %(default)s)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.images} images of {TOKENS} tokens, {PATTERN}", flush=True)
    everything: dict[str, float] = {}
    for name in args.models:
        total: dict[str, float] = {}
        for layer, shape in shapes(WIDTHS[name]).items():
            print(f"  {name} {layer} {shape}", flush=True)
            medians = measure(CLOCKS[args.clock], shape, args.images, args.batch, args.repeats)
            for phase, median in medians.items():
                total[phase] = total.get(phase, 0) + median
                everything[phase] = everything.get(phase, 0) + median
        compare(name, total)
    compare("all", everything)


if __name__ == "__main__":
    main()
