"""2:4 against dense on a GPU, in bfloat16: the layers of ViT-B and ViT-L by themselves, and both models end to end,
eager, with compiled blocks, and compiled and replayed as a CUDA graph. Interleaved, medians and quartiles.

    python3 -m benchmarks.semi_structured                  # at most 3 minutes; --seconds sets the limit
    python3 -m benchmarks.semi_structured --json FILE      # the table as JSON too

It needs torch (cuSPARSELt comes with it), numpy, and timm for the models; no network, no data: weights are random, with
the zeros of 2:4 by magnitude. Without a GPU of compute capability 8.0 or more it says so, and runs all of it with small
layers on the CPU, where "2:4" is the dense product with zeros: a test of the script, not of 2:4.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsity.kernels.semi_structured import SemiStructuredLinear

TOKENS = 197  # of an image of 224 x 224 in patches of 16 x 16, and the class token
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}  # (out, in) in multiples of the width
WIDTHS = {"ViT-B": 768, "ViT-L": 1024}
NAMES = {"ViT-B": "vit_base_patch16_224", "ViT-L": "vit_large_patch16_224"}
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32}
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table: milliseconds of the dense and of the 2:4 variant, median and quartiles."""

    what: str
    mode: str
    batch: int
    dense: tuple[float, float, float]
    sparse: tuple[float, float, float]

    @property
    def line(self) -> str:
        """Return the line in Markdown; no ratio is given that the quartiles of both leave open."""
        (low, dense, high), (least, sparse, most) = self.dense, self.sparse
        clear = high < least or most < low
        ratio = f"{dense / sparse:.2f}" if clear else f"{dense / sparse:.2f} (within the noise)"
        return (
            f"| {self.what} | {self.mode} | {self.batch} | {dense:.3f} ({low:.3f} to {high:.3f}) "
            f"| {sparse:.3f} ({least:.3f} to {most:.3f}) | {ratio} |"
        )


def keep_two_of_four(weight: Tensor) -> Tensor:
    """Return a weight (out, in) with the two smallest magnitudes of each four along its inputs set to zero."""
    groups = weight.unflatten(1, (-1, 4))
    pruned = groups.abs().topk(2, dim=-1, largest=False).indices
    return groups.scatter(-1, pruned, 0.0).flatten(1)


def sparse_layer(linear: nn.Module, tokens: int) -> nn.Module:
    """Return a linear layer with a 2:4 weight as the GPU's kernel takes it, for inputs of so many tokens; on the CPU
    the layer itself.
    """
    weight, bias = linear.weight.detach(), linear.bias
    return SemiStructuredLinear(weight, bias.detach(), tokens) if weight.is_cuda else linear


class Bench:
    """Times pairs of variants on one device, until the time that is given is used up."""

    def __init__(self, device: torch.device, seconds: float, rounds: int):
        self.device, self.rounds, self.rows, self.skipped = device, rounds, list[Row](), list[str]()
        self.cuda, self.end = device.type == "cuda", time.monotonic() + seconds

    def over(self, label: str) -> bool:
        """Return whether there is no time left for what is labelled so, which is noted."""
        if time.monotonic() > self.end:
            self.skipped.append(label)
        return time.monotonic() > self.end

    def compare(self, what: str, mode: str, batch: int, dense: Run, sparse: Run) -> None:
        """Time two variants in turns, and add and print their row; what fails is named instead."""
        if self.over(f"{what} {mode} batch {batch}"):
            return
        variants = {"dense": dense, "2:4": sparse}
        try:
            for run in variants.values():  # compiled, and warm
                for _ in range(3):
                    run()
            calls = self._calls(dense)
            taken: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(self.rounds):
                for name, run in variants.items():
                    taken[name].append(self._milliseconds(run, calls))
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this GPU or version lacks
            print(f"| {what} | {mode} | {batch} | failed: {' '.join(str(error).split())[:150]} | | |", flush=True)
            return
        row = Row(what, mode, batch, *(quartiles(taken[name]) for name in variants))
        self.rows.append(row)
        print(row.line, flush=True)

    def _calls(self, run: Run) -> int:
        """Return how many calls take about 10 ms together."""
        return max(1, min(200, int(10 / max(self._milliseconds(run, 1), 0.01))))

    def _milliseconds(self, run: Run, calls: int) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return 1000 * (time.perf_counter() - begin) / calls
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / calls


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@torch.inference_mode()
def layers(bench: Bench, widths: Mapping[str, int], batches: list[int], dtype: torch.dtype) -> None:
    """Compare single layers, eager: 2:4 with the algorithm that cuSPARSELt's search finds."""
    for model, width in widths.items():
        for layer, (rows, columns) in LAYERS.items():
            dense = nn.Linear(columns * width, rows * width, device=bench.device, dtype=dtype)
            dense.weight.data = keep_two_of_four(dense.weight.data)
            for batch in batches:
                what = f"{model} {layer} {tuple(dense.weight.shape)}"
                if bench.over(f"{what} batch {batch}"):
                    continue
                inputs = torch.randn(batch, TOKENS, columns * width, device=bench.device, dtype=dtype)
                sparse = sparse_layer(dense, batch * TOKENS)
                check(what, dense(inputs), sparse(inputs))
                bench.compare(what, "layer", batch, partial(dense, inputs), partial(sparse, inputs))


def check(what: str, dense: Tensor, sparse: Tensor) -> None:
    """Print a line where the 2:4 product is not that of the same weights in the dense product."""
    error = float((dense.float() - sparse.float()).norm() / dense.float().norm())
    if not error < 2e-2:  # bfloat16 has 8 bits, and a model tens of products
        print(f"| {what}: the outputs of 2:4 and dense differ by {error:.2e} of their norm |", flush=True)


@torch.inference_mode()
def models(bench: Bench, names: Mapping[str, str], batches: list[int], dtype: torch.dtype, **options: int) -> None:
    """Compare whole models: eager, with compiled blocks, and those replayed as a CUDA graph."""
    import timm

    for model, name in names.items():
        dense = timm.create_model(name, pretrained=False, **options).to(bench.device, dtype).eval()
        linears = [m for block in dense.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            linear.weight.data = keep_two_of_four(linear.weight.data)
        size = options.get("img_size", 224)
        for batch in batches:
            images = torch.randn(batch, 3, size, size, device=bench.device, dtype=dtype)
            if not bench.over(f"{model} batch {batch}"):
                sparse = as_sparse(dense, images)
                check(f"{model} batch {batch}", dense(images), sparse(images))
                _modes(bench, model, batch, copy.copy(dense), sparse, images)


def _modes(bench: Bench, model: str, batch: int, dense: nn.Module, sparse: nn.Module, images: Tensor) -> None:
    bench.compare(model, "eager", batch, partial(dense, images), partial(sparse, images))
    if bench.over(f"{model} compiled batch {batch}"):
        return
    torch._dynamo.reset()
    for each in (dense, sparse):
        for block in each.blocks:
            block.compile(dynamic=False)  # blocks are alike: they share what is compiled
    bench.compare(model, "compiled", batch, partial(dense, images), partial(sparse, images))
    if bench.cuda and not bench.over(f"{model} graph batch {batch}"):
        try:
            bench.compare(model, "compiled, CUDA graph", batch, captured(dense, images), captured(sparse, images))
        except RuntimeError as error:
            print(f"| {model} | CUDA graph | {batch} | failed: {str(error)[:150]} | | |", flush=True)
    for each in (dense, sparse):
        for block in each.blocks:
            block._compiled_call_impl = None


def as_sparse(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a ViT of timm whose blocks have 2:4 layers, each for the number of tokens that it gets."""
    copied, tokens = copy.deepcopy(model), dict[nn.Module, int]()
    linears = {m for block in copied.blocks for m in block.modules() if isinstance(m, nn.Linear)}
    hooks = [linear.register_forward_pre_hook(partial(_note, tokens)) for linear in linears]
    copied(images)
    for hook in hooks:
        hook.remove()
    for parent in list(copied.blocks.modules()):
        for name, child in list(parent.named_children()):
            if child in linears:
                setattr(parent, name, sparse_layer(child, tokens[child]))
    return copied


def _note(tokens: dict[nn.Module, int], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    tokens[module] = arguments[0].shape[:-1].numel()


def captured(model: nn.Module, images: Tensor) -> Run:
    """Return what replays a forward pass as a CUDA graph: no time is lost in launching kernels."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="limit; what comes later is left out (default: 150)")
    parser.add_argument("--rounds", type=int, default=15, help="of both variants in turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the table (default: none)")
    args = parser.parse_args(arguments)
    ready = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    bench = Bench(torch.device("cuda" if ready else "cpu"), args.seconds, args.rounds)
    if ready:
        device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        device += f", cuSPARSELt {torch.backends.cusparselt.version()}"
    else:
        device = "no GPU of compute capability 8.0 or more: 2:4 is not measured here, this only tests the script"
    print(
        f"{device}\n\n| what | mode | batch | dense, ms | 2:4, ms | dense / 2:4 |\n|---|---|---|---|---|---|",
        flush=True,
    )
    if ready:
        models(bench, {"ViT-B": NAMES["ViT-B"]}, [1, 8, 64, 256], torch.bfloat16)
        layers(bench, WIDTHS, [1, 8, 64, 256], torch.bfloat16)
        models(bench, {"ViT-L": NAMES["ViT-L"]}, [8, 64, 256], torch.bfloat16)
    else:
        layers(bench, {"tiny": 64}, [1], torch.float32)
        models(bench, {"tiny": NAMES["ViT-B"]}, [2], torch.float32, **TINY)
    if bench.skipped:
        print(f"\nleft out after {args.seconds:g} s: {', '.join(dict.fromkeys(bench.skipped))}")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "rows": [asdict(row) for row in bench.rows]}, indent=1))


if __name__ == "__main__":
    main()
