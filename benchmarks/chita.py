"""CHITA at the size of DINO's ViT-B/16, random weights: peak memory of the whole pruning, and the solve against a plain
NumPy formulation (full argsort, one solve per block) on the same gradient rows. Interleaved, medians.

    python -m benchmarks.chita                     # 10 GB of memory, 7 GB of disk; about 10 minutes on two cores
    python -m benchmarks.chita --layers 2 --batches 4
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

import pruners
from benchmarks.calibration import anonymous_megabytes, peak, seconds
from sparsity.allocation.budget import budget
from sparsity.run.request import Request
from sparsity.solvers.blockwise import cut, objective, solve
from sparsity.statistics.gradient_rows import Rows, Scratch, gradient_rows
from sparsity.statistics.reading import CalibrationPass
from sparsity.view import PrunableView

GOALS = {"memory": 1536, "speed": 3.0}  # MB above the model and its gradients; times as fast
CLASSES = 1000
RIDGE = 1e-5


def vit(layers: int) -> PrunableView:
    """ViT-B/16 with a loss on (images, labels); its classifier stays dense."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=CLASSES)).eval()

    def loss(batch: tuple[Tensor, Tensor], _: torch.Generator | None) -> Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(model(images).logits, labels)

    return PrunableView(model, group_of=lambda name: "vision", keep_dense=("classifier",), loss=loss)


class RandomBatches:
    """`count` times `size` images with labels, drawn when they are asked for."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for number in range(self.count):
            generator = torch.Generator().manual_seed(number)
            images = torch.randn(self.size, 3, 224, 224, generator=generator)
            yield images, torch.randint(CLASSES, (self.size,), generator=generator)


def read(view: PrunableView, batches: RandomBatches, folder: Path) -> Rows:
    """The gradient rows, in a file."""
    scratch = Scratch(folder / "rows", "benchmark")
    return gradient_rows(view, batches, rounds=[1] * len(batches), budget=0, scratch=scratch)


def prune(view: PrunableView, batches: RandomBatches, folder: Path, sparsity: str) -> None:
    """Prune as prune.py does with `--memory_budget 0`."""
    pruner = pruners.build("chita", memory_budget=0)
    measured = pruner.measure(view, CalibrationPass(batches, scratch=Scratch(folder / "rows", "benchmark")))
    for _ in pruner.masks(view, measured, Request([sparsity])):
        pass


def ours(rows: Rows, view: PrunableView, count: int) -> dict[str, Tensor]:
    weights = {name: weight.matrix() for name, weight in view.weights.items()}
    return {name: solved for name, _, solved in solve(rows, weights, count, ridge=RIDGE)}


def plain_step(A: np.ndarray, w: np.ndarray, start: np.ndarray, a: np.ndarray, count: int, mu: float) -> np.ndarray:
    """A projected-gradient step with line search on Q, from `start`: w where `count` weights are not zero."""

    def project(vector: np.ndarray) -> np.ndarray:
        order = np.argsort(-np.abs(vector))
        result = np.zeros_like(vector)
        result[order[:count]] = vector[order[:count]]
        return result

    def value(vector: np.ndarray) -> float:
        error, change = A @ (w - vector), vector - w
        return error @ error / 2 + a @ vector + mu / 2 * (change @ change)

    order = np.argsort(-np.abs(start))
    inside, outside = order[:count], order[count:]
    slope = a - A.T @ (A @ (w - start)) + mu * (start - w)
    kept = np.zeros_like(slope)
    kept[inside] = slope[inside]
    along, squares = A @ kept, kept @ kept
    step = squares / (along @ along + mu * squares) if squares > 0 else 0.0

    def stays(step: float) -> bool:
        moved = np.abs(start - step * slope)
        return not len(outside) or moved[inside].max() >= moved[outside].max() - 1e-10

    if stays(step):
        result = start - step * slope
        result[outside] = 0
        return result
    step /= 2
    while not stays(step):
        step /= 2
    best = start.copy()
    best[outside] = 0
    lowest = value(best)
    for _ in range(10):
        trial = project(start - step * slope)
        if value(trial) >= lowest:
            break
        best, lowest = trial, value(trial)
        step *= 2
    return best


def plain(rows: np.ndarray, weights: np.ndarray, bounds: list[int], count: int, batch_size: float) -> np.ndarray:
    """The same method with whole vectors and matrices."""
    n, mu = len(rows), len(rows) * RIDGE
    a = rows.sum(0) / batch_size
    start = plain_step(rows, weights, weights, a, count, mu)
    result = np.zeros_like(weights)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        A, w, part = rows[:, begin:end], weights[begin:end], start[begin:end]
        keep = np.count_nonzero(part)
        if not keep:
            continue
        part = plain_step(A, w, part, a[begin:end], keep, mu)
        inside = np.argsort(-np.abs(part))[:keep]
        X = A[:, inside].astype(np.float64)
        right = X.T @ (A @ w) + mu * w[inside] - a[begin:end][inside]
        small = np.linalg.solve(np.eye(n) + X @ X.T / mu, X @ right)
        result[begin + inside] = right / mu - X.T @ small / mu**2
    return result


def measure_memory(arguments: list[str], view: PrunableView) -> None:
    """In a process of its own, against what it holds before the model is built."""
    command = [sys.executable, "-m", "benchmarks.chita", "--memory", *arguments]
    above = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    model = sum(p.numel() * p.element_size() for p in view.model.parameters()) / 2**20
    gradients = sum(w.numel * w.parameter.element_size() for w in view.weights.values()) / 2**20
    extra = above - model - gradients
    print(
        f"peak anonymous memory {above:.0f} MB: model {model:.0f} MB, gradients {gradients:.0f} MB, and {extra:.0f} MB "
        f"(goal {GOALS['memory']})",
        flush=True,
    )


def compare_solvers(view: PrunableView, rows: Rows, path: Path, count: int, repeats: int) -> None:
    weights = {name: weight.matrix() for name, weight in view.weights.items()}
    flat = torch.cat([weight.reshape(-1) for weight in weights.values()]).numpy()
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(rows.n, rows.width))
    bounds, first = [0], 0
    for weight in weights.values():
        bounds += [first + bound for bound in cut(weight.numel())[1:]]
        first += weight.numel()
    times, found = [], {}
    for _ in range(repeats):
        rows = Rows(torch.from_file(str(path), size=mapped.size).view(mapped.shape), range(rows.n), rows.n, rows.images)
        mine = seconds(lambda rows=rows: found.update(ours=ours(rows, view, count)))
        theirs = seconds(lambda size=rows.batch_size: found.update(plain=plain(mapped, flat, bounds, count, size)))
        times.append((mine, theirs))
        print(f"  ours {mine:.1f} s, NumPy {theirs:.1f} s, ratio {theirs / mine:.2f}", flush=True)
    split = torch.from_numpy(found["plain"]).split([weight.numel() for weight in weights.values()])
    found["plain"] = {n: part.view(w.shape) for (n, w), part in zip(weights.items(), split, strict=True)}
    for label, solution in found.items():
        kept = sum(int(weight.count_nonzero()) for weight in solution.values())
        print(f"{label}: Q = {objective(rows, weights, solution, RIDGE):.6f}, {kept} of {count} kept")
    mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"solve: {mine:.1f} s, NumPy: {theirs:.1f} s, {ratio:.2f} times as fast (goal {GOALS['speed']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=20, help="gradient rows (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="images (default: %(default)s)")
    parser.add_argument("--sparsity", default="0.63", help="fraction that goes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="solves of each side (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk, for the rows; default: a temporary one")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of pruning, in MB, and end")
    args = parser.parse_args()
    batches = RandomBatches(args.batches, args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if args.memory:
            before = anonymous_megabytes()
            print(peak(lambda: prune(vit(args.layers), batches, folder, args.sparsity)) - before)
            return
        view = vit(args.layers)
        print(f"{view.numel:,} prunable weights, {args.batches} rows, {torch.get_num_threads()} threads", flush=True)
        options = ("layers", "batches", "batch_size", "sparsity")
        measure_memory([part for name in options for part in (f"--{name}", str(vars(args)[name]))], view)
        rows = read(view, batches, folder)
        count = view.numel - budget(args.sparsity, view.numel)
        compare_solvers(view, rows, folder / "rows.rows", count, args.repeats)


if __name__ == "__main__":
    main()
