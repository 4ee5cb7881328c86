"""Memory of pruning: the peak of anonymous memory above the model, in bytes a prunable weight, for two sizes of a stack
of float32 linear layers, and the slope between them, from which what does not grow with the model has gone.

    python -m benchmarks.memory                        # all plans: 4 GB of memory, about 15 minutes on one core
    python -m benchmarks.memory --plans omp sparsegpt+enable_update --blocks 2 6

A plan is a pruner's name, with switches of its own after a + and values after a =. Each run is a process of its own,
which loads the model, says so, and waits; from then on this process reads the RssAnon of that one (mapped files do not
count: what the operating system can take back is not needed) until it ends. The masks are read one sparsity after the
other, and each is saved, as prune.py does without evaluation. Batches are small, so that activations are negligible.

glibc decides as it runs which blocks, up to 32 MB, it takes from a heap whose holes it keeps: with its defaults the
slope of one plan differs by 3 bytes and more from run to run. So the processes are started with a threshold that stays
(MALLOC_MMAP_THRESHOLD_): larger blocks go back as soon as they are freed, and the peak is what is held. `--threshold 0`
leaves glibc alone; take --repeats then. What loading has left free is given back (malloc_trim) before that.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pruners
from engine.tensor_stream import stream_tensors
from sparsity.masks import Masks
from sparsity.view import PrunableView

WIDTH, INNER = 768, 3072  # of a block: two layers
BATCHES, TOKENS = 2, 8
SPARSITIES = ("0.63", "0.75")
SOLVER, GRADIENT, LEARNED = 3.0, 9.0, 18.0
GOALS = {
    **dict.fromkeys(("omp", "localmp", "l2", "lamp", "magnitude", "multiflow", "wanda"), SOLVER),
    **dict.fromkeys(("wanda+calibration_mode=sequential", "sparsegpt", "sparsegpt+enable_update"), SOLVER),
    **{"snip": GRADIENT, "tamt": LEARNED, "chita": SOLVER},
}
ROWS = {"chita": 4.0 * BATCHES}  # bytes a weight that are taken off: gradient rows, float32
THRESHOLD = 1 << 20  # bytes of the smallest block that goes back when it is freed
INTERVAL = 0.004  # seconds between two readings


class Block(nn.Module):
    """x + W2 gelu(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def stack(blocks: int) -> PrunableView:
    """A model of so many blocks, with a loss on its inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    return PrunableView(
        model,
        group_of=lambda name: "vision",
        forward=model,
        loss=lambda batch, _: model(batch).square().mean(),
        blocks=list(model),
    )


def parsed(plan: str) -> tuple[str, dict[str, Any]]:
    """A pruner's name, and its options."""
    name, *options = plan.split("+")
    pairs = [option.partition("=") for option in options]
    return name, {key: value if equals else True for key, equals, value in pairs}


def save(masks: Masks, view: PrunableView, path: Path) -> None:
    """Write and report a set of masks as prune.py does."""
    masks.save(path.with_suffix(".masks"))
    if masks.weights:
        shapes = {name: tuple(view.weights[name].parameter.shape) for name in masks.weights}
        stream_tensors(path.with_suffix(".weights"), shapes, ((name, masks.weights[name]) for name in shapes))
    masks.report(view)


def prune(plan: str, blocks: int, folder: Path) -> None:
    """Load, wait, prune: the process that is measured."""
    name, options = parsed(plan)
    view, pruner = stack(blocks), pruners.build(name, **options)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(BATCHES)]
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    print(view.numel, flush=True)
    sys.stdin.readline()
    for sparsity, masks in pruner.prune(view, batches, SPARSITIES):
        save(masks, view, folder / str(float(sparsity)))


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def measured(plan: str, blocks: int, folder: Path | None, threshold: int = THRESHOLD) -> tuple[int, int]:
    """Prunable weights, and the most bytes above the loaded model. threshold: see the module; 0: glibc's own."""
    environment = dict(os.environ) | ({"MALLOC_MMAP_THRESHOLD_": str(threshold)} if threshold else {})
    command = [sys.executable, "-m", "benchmarks.memory", "--run", plan, "--blocks", str(blocks)]
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        subprocess.Popen(
            [*command, "--folder", place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process,
    ):
        assert process.stdin and process.stdout, "they are pipes"
        weights = int(process.stdout.readline() or 0)
        before = highest = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{plan}: the run of {blocks} blocks has failed")
    return weights, highest - before


def row(plan: str, sizes: list[int], repeats: int, folder: Path | None, threshold: int) -> str:
    """A line of the table; medians of the repeats."""
    found = []
    for blocks in sizes:
        runs = [measured(plan, blocks, folder, threshold) for _ in range(repeats)]
        found.append((runs[0][0], statistics.median(size for _, size in runs)))
    (small, least), (large, most) = found
    rows = ROWS.get(parsed(plan)[0], 0.0)
    slope = (most - least) / (large - small) - rows
    goal = GOALS.get(plan)
    verdict = "-" if goal is None else f"{goal:g}" + ("" if slope <= goal else ", missed")
    return f"| {plan} | {least / small - rows:.2f} | {most / large - rows:.2f} | {slope:.2f} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=list(GOALS), metavar="PLAN", help="default: %(default)s")
    parser.add_argument("--blocks", nargs="+", type=int, default=[7, 36], help="of both models (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each size (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="on a disk, for what is saved (default: a temporary)")
    parser.add_argument("--threshold", type=int, default=THRESHOLD, help="bytes; 0: glibc's own (default: %(default)s)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        prune(args.run, args.blocks[0], args.folder)
        return
    numbers = " and ".join(f"{2 * WIDTH * INNER * blocks / 1e6:.0f} M" for blocks in args.blocks)
    print(f"Bytes a prunable weight above the model; {numbers} weights, sparsities {', '.join(SPARSITIES)}", flush=True)
    print(
        f"(OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, threshold {args.threshold or 'of glibc'})\n",
        flush=True,
    )
    print("| plan | small | large | slope | goal |\n|---|---|---|---|---|", flush=True)
    for plan in args.plans:
        print(row(plan, args.blocks, args.repeats, args.folder, args.threshold), flush=True)


if __name__ == "__main__":
    main()
