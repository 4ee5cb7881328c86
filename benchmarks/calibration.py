"""Costs of pruning above its floor, XVLM at base size with random weights: calibration against the bare passes over
the same batches, selection against cat + kthvalue, LAMP against its plain form. Interleaved, medians.

    python -m benchmarks.calibration                        # 2 GB of memory; about 15 minutes on two cores
    python -m benchmarks.calibration --batches 2 --variant mini
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pruners
from configs.loading import load_config
from models.xvlm import model as xvlm
from sparsity.run.engine import Measured
from sparsity.selection import keep, thresholds
from sparsity.statistics.gradients import mean_gradients
from sparsity.statistics.inputs import Statistics
from sparsity.view import PrunableView

PASSES = ("forward", "multiflow", "forward + backward", "snip")
PAIRS = (("multiflow", "forward", 1.15), ("snip", "forward + backward", 1.1))


def random_batches(config: xvlm.Config, pairs: int, size: int) -> list[dict[str, Tensor]]:
    """`pairs` times a general batch of `size` image-text pairs and one of `size` regions in half as many images."""
    generator = torch.Generator().manual_seed(0)
    side, length, tokens = config.vision.image_size, config.max_tokens, config.vision.tokens

    def text() -> dict[str, Tensor]:
        ids = torch.randint(5, config.text.vocab_size, (size, length), generator=generator)
        real = torch.randint(8, length + 1, (size, 1), generator=generator)
        atts = (torch.arange(length) < real).long()
        positions = torch.randint(1, 8, (size, 4), generator=generator)
        fields = {"text_ids": ids, "text_atts": atts, "text_ids_masked": ids}
        return fields | {"masked_pos": positions, "masked_ids": ids.gather(1, positions)}

    batches = []
    for _ in range(pairs):
        batches.append({"image": torch.randn(size, 3, side, side, generator=generator), **text()})
        images = size // 2
        region = {
            "image": torch.randn(images, 3, side, side, generator=generator),
            "idx_to_group_img": torch.arange(size) % images,
            "image_atts": torch.cat(
                [torch.ones(size, 1), (torch.rand(size, tokens - 1, generator=generator) < 0.4).float()], 1
            ).long(),
            "is_image": torch.zeros(size, dtype=torch.long),
            "target_bbox": torch.rand(size, 4, generator=generator),
        }
        batches.append(region | text())
    return batches


def forward(view: PrunableView, batches: list[dict]) -> None:
    with torch.no_grad():
        for batch in batches:
            view.forward(batch)


def multiflow(view: PrunableView, batches: list[dict]) -> None:
    with Statistics(view, "input_norms") as collected:
        for batch in batches:
            collected.add(batch)
    collected.result()


def forward_backward(view: PrunableView, batches: list[dict]) -> None:
    for weight in view.weights.values():
        weight.parameter.grad = None
    for number, batch in enumerate(batches):
        view.loss(batch, torch.Generator().manual_seed(number)).backward()
    for weight in view.weights.values():
        weight.parameter.grad = None


def snip(view: PrunableView, batches: list[dict]) -> None:
    mean_gradients(view, batches)


RUN: dict[str, Callable[[PrunableView, list[dict]], None]] = dict(
    zip(PASSES, (forward, multiflow, forward_backward, snip), strict=True)
)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(label: str, floor: str, ours: list[float], theirs: list[float], goal: float) -> None:
    """Medians of both sides, and the median of the ratios of runs that followed each other."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"{label}: {statistics.median(ours):.2f} s, {floor}: {statistics.median(theirs):.2f} s, "
        f"ratio {ratio:.2f} (goal {goal})",
        flush=True,
    )


def time_passes(view: PrunableView, batches: list[dict]) -> None:
    """Each pair of batches (general, region) is one run of every pass."""
    times: dict[str, list[float]] = {name: [] for name in PASSES}
    for name in PASSES:  # warm-up
        RUN[name](view, batches[:2])
    for first in range(0, len(batches), 2):
        for name in PASSES:
            times[name].append(seconds(lambda name=name, first=first: RUN[name](view, batches[first : first + 2])))
    for ours, floor, goal in PAIRS:
        compare(ours, floor, times[ours], times[floor], goal)


def plain_lamp(weights: list[Tensor]) -> list[Tensor]:
    """Sort, cumulative sum, scatter, layer by layer."""
    scores = []
    for weight in weights:
        squares, order = weight.flatten().square().double().sort()
        rest = squares.sum() - squares.cumsum(0) + squares
        scores.append(torch.empty_like(squares).scatter_(0, order, squares / rest).view(weight.shape))
    return scores


def time_selection(view: PrunableView, repeats: int) -> None:
    scores = {name: weight.matrix().abs() for name, weight in view.weights.items()}
    count = int(0.63 * view.numel)

    def ours() -> None:
        dict(keep(scores, thresholds(scores, [count])[0]))

    def plain() -> None:
        value = torch.cat([score.flatten() for score in scores.values()]).kthvalue(count).values
        [score > value for score in scores.values()]

    times = [(seconds(ours), seconds(plain)) for _ in range(repeats)]
    compare("selection, one sparsity", "cat + kthvalue", *map(list, zip(*times, strict=True)), goal=0.5)
    further = [seconds(lambda: thresholds(scores, [count, count // 2, count // 4])) for _ in range(repeats)]
    one = [seconds(lambda: thresholds(scores, [count])) for _ in range(repeats)]
    compare("thresholds of three sparsities", "of one", further, one, goal=3.0)


def time_lamp(view: PrunableView, repeats: int) -> None:
    lamp, weights = pruners.build("lamp"), [weight.matrix() for weight in view.weights.values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = [seconds(lambda: plain_lamp(weights)) for _ in range(repeats)]
    floor = [seconds(lambda: [w.abs().flatten().sort(stable=True) for w in weights]) for _ in range(repeats)]
    torch.set_num_threads(threads)
    ours = [seconds(lambda: [None for _ in lamp.scores(view, Measured())]) for _ in range(repeats)]
    compare("LAMP scores", "sort + cumsum + scatter in one thread", ours, plain, goal=0.33)
    compare("LAMP scores", "its sort alone in one thread", ours, floor, goal=1.0)


def anonymous_megabytes() -> float:
    """Memory of this process that is not a mapped file (Linux)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise ValueError("/proc/self/smaps_rollup has no line 'Anonymous:'")


def peak(call: Callable[[], object]) -> float:
    """Highest anonymous memory while `call` runs, sampled."""
    highest, done = [anonymous_megabytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return highest[0]


def measure_memory(arguments: list[str], size: float) -> None:
    """Each pass in a process of its own, so that no freed memory of another counts."""
    peaks = {}
    for name in PASSES:
        command = [sys.executable, "-m", "benchmarks.calibration", "--memory_of", name, *arguments]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    for ours, floor, _ in PAIRS:
        extra = (peaks[ours] - peaks[floor]) / size
        print(f"{ours}: peak {peaks[ours]:.0f} MB, {floor}: {peaks[floor]:.0f} MB, {extra:+.2f} x the model (goal 0.4)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("base", "mini"), default="base", help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=8, help="general and region batches each (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="of selection and scores (default: %(default)s)")
    parser.add_argument("--memory_of", choices=PASSES, help="print the peak memory of one pass, in MB, and end")
    args = parser.parse_args()
    config = load_config(Path("configs/xvlm") / f"model_{args.variant}.yaml", xvlm.Config)
    torch.manual_seed(0)
    model = xvlm.build(config).eval()
    view = xvlm.prunable_view(model)
    if args.memory_of:
        batches = random_batches(config, 2, args.batch_size)
        print(peak(lambda: RUN[args.memory_of](view, batches)))
        return
    print(f"XVLM {args.variant}, {view.numel:,} prunable weights, {torch.get_num_threads()} threads", flush=True)
    time_selection(view, args.repeats)
    time_lamp(view, args.repeats)
    sizes = ["--variant", args.variant, "--batch_size", str(args.batch_size)]
    measure_memory(sizes, sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20)
    time_passes(view, random_batches(config, args.batches, args.batch_size))


if __name__ == "__main__":
    main()
