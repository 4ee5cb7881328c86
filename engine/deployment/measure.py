"""Time, memory and arithmetic of a model in several variants, side by side in one run."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
Run = Callable[[int], Any]  # a forward pass of a batch of this size


@dataclass
class Variant:
    """A way to run a model. ready: puts it in place for a batch of this size, a context. bytes: of its file.
    weights: that are stored or multiplied, as the kind has it. operations: multiply-adds of one sample in linear layers
    and convolutions. quality: metric -> value. seconds: batch size -> of each round. memory: batch size -> bytes that a
    forward pass takes besides the weights.
    """

    name: str
    run: Run | None
    ready: Callable[[int], AbstractContextManager[Any]] = nullcontext
    bytes: int = 0
    parameters: int = 0
    operations: int = 0
    quality: Mapping[str, float] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(variants: Sequence[Variant], batches: Sequence[int], rounds: int, clock: Callable[[], float]) -> None:
    """Fill `seconds` and `memory`: all variants in turns, in each round in another order, after a pass to get warm."""
    runs = [(each, each.run) for each in variants if each.run is not None]
    for batch in batches:
        for variant, run in runs:
            with variant.ready(batch), torch.no_grad():
                run(batch)
                variant.memory[batch] = peak_memory(partial(run, batch))
        for turn in range(rounds):
            for variant, run in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
                with variant.ready(batch), torch.no_grad():
                    _synchronise()
                    begin = clock()
                    run(batch)
                    _synchronise()
                    variant.seconds.setdefault(batch, []).append(clock() - begin)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any]) -> int:
    """Return the bytes that a call takes at most beyond what there was before; 0 where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it is counted when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident size begins anew
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):  # no Linux
        run()
        return 0


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@torch.no_grad()
def multiply_adds(model: nn.Module, run: Callable[[], Any], samples: int) -> tuple[int, int]:
    """Return the multiply-adds for one sample in linear layers and convolutions: of all weights, and of those alone
    that are not zero. Products of attention are not in it: no weight is.

    run: a forward pass of so many samples.
    """
    dense = sparse = 0

    def count(module: Any, _: Any, output: Any) -> None:
        nonlocal dense, sparse
        weight = module.weight
        places = output.numel() // (weight.shape[0] if isinstance(module, _CONVOLUTIONS) else output.shape[-1])
        dense += places * weight.numel()
        sparse += places * int(weight.count_nonzero())

    counted = [m for m in model.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS)) or type(m).__name__ == "Conv1D"]
    hooks = [module.register_forward_hook(count) for module in counted]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return dense // samples, sparse // samples


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense 16-bit products in FLOP/s, and bytes/s of its memory."""

    flops: float
    bandwidth: float


GPUS = {
    "A100": Gpu(312e12, 2.04e12),
    "H100": Gpu(989e12, 3.35e12),
    "H200": Gpu(989e12, 4.8e12),
    "L4": Gpu(121e12, 0.3e12),
    "RTX 4090": Gpu(165e12, 1.01e12),
}


def roofline(gpu: Gpu, operations: int, weights: int, batch: int, *, semi_structured: bool = False) -> float:
    """Return the least seconds that a batch can take in 16 bits: max(2 F B / P, W b / M).

    operations: F, multiply-adds of a sample. weights: W, that are read once. P: the GPU's FLOP/s, M: its bytes/s, b: 2
    bytes. 2:4 halves F for the layers that have it, at most, and needs 9/16 of b.
    """
    share = 0.5 if semi_structured else 1.0
    read = 2 * weights * (9 / 16 if semi_structured else 1.0)
    return max(2 * operations * share * batch / gpu.flops, read / gpu.bandwidth)
