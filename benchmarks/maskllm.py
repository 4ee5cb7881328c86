"""Cost of learnable 2:4 masks: a training step of a vision transformer dense, with the masks of sparsity.maskllm, and
with masks by the plain formulation, whose noise, softmax and soft mask are kept for the backward pass. Eager and
compiled, interleaved, medians; then the memory that each step needs beyond weights, gates, gradients of what learns and
optimizer state. Compiled, ours is compared with the plain formulation as it is written, and as the compiler makes it,
which fuses most of it away, too.

    python -m benchmarks.maskllm                              # ViT-S and ViT-B: 5 GB of memory, 15 minutes on two cores
    python -m benchmarks.maskllm --sizes small --repeats 2 --modes eager
    python -m benchmarks.maskllm --clock cpu                  # ratios of processor time, on a machine that others use
"""

import argparse
import logging
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from engine.training.fit import attention
from models.external.model import prunable_view
from sparsity.learned.gates import candidates
from sparsity.learned.learnable_masks import LearnableMasks
from sparsity.pattern import NM

PATTERN, REGULARISER, SETTING = NM(2, 4), 1e-5, {"scaling": 10.0, "tau": 4.0}
SIZES = {"small": "vit_small_patch16_224", "base": "vit_base_patch16_224"}
WAYS = {"dense": "dense", "ours": "ours", "plain": "plain"}
AS_WRITTEN = "plain, not compiled"
GOALS = {"eager": 1.7, "compiled": 1.3}  # ours against dense, time
FASTER, MEMORY = 1.4, 1.1  # plain against ours, compiled; ours against dense with frozen weights
CLOCKS = ("wall", "cpu")


class PlainMask(nn.Module):
    """A linear layer with a learnable mask as the paper's formulas are usually written down."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        kept = candidates(PATTERN)
        self.gate = nn.Parameter(0.2 * torch.randn(layer.weight.numel() // PATTERN.m, len(kept)))
        self.register_buffer("kept", kept)
        self.norm: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        soft = F.gumbel_softmax(self.gate * SETTING["scaling"], tau=SETTING["tau"], dim=1)
        mask = (soft @ self.kept).view(self.weight.shape)
        self.norm = (self.weight.detach() * mask).square().sum()
        return F.linear(x, self.weight * mask, self.bias)


class Step:
    """A training step: forward, backward, AdamW. masks: None trains the weights, "ours" and "plain" the gates alone;
    "frozen" is dense, and only the head learns.
    """

    def __init__(self, size: str, way: str, args: argparse.Namespace, compiled: bool = False):
        torch.manual_seed(0)
        self.net, self.masks, self.autocast = timm.create_model(SIZES[size], depth=args.depth).train(), None, args.bf16
        if way == "ours":
            self.masks = LearnableMasks(prunable_view(self.net), PATTERN)
            self.masks.freeze_weights()
            self.masks.anneal(**SETTING)
        if way == "plain":
            self.net.requires_grad_(False)
            for name, module in list(self.net.blocks.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, own = name.rpartition(".")
                    setattr(self.net.blocks.get_submodule(parent), own, PlainMask(module))
        if way == "frozen":  # gradients flow to the first block, as they must for its mask
            self.net.requires_grad_(False)
            self.net.blocks[0].norm1.requires_grad_(True)
        self.plain = [module for module in self.net.modules() if isinstance(module, PlainMask)]
        self.learning = [p for p in self.net.parameters() if p.requires_grad]
        # The faster one for what learns: the fused one copies gates, whose memory is transposed.
        fastest = {"foreach": True} if way == "ours" else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, **fastest)
        self.model = torch.compile(self.net) if compiled else self.net
        self.image, self.label = torch.randn(args.batch_size, 3, 224, 224), torch.arange(args.batch_size)
        self.number = 0

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model(self.image).float(), self.label)
        if self.masks is not None:
            return loss - REGULARISER * self.masks.squared_weight()
        return loss - REGULARISER * sum(module.norm for module in self.plain)

    def backward(self) -> None:
        if self.masks is not None:
            self.masks.draw(self.number)
        self.number += 1
        with attention(torch.device("cpu")):
            self.loss().backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds that passed, and of the processor."""
    begin = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def peak(call: Callable[[], object]) -> int:
    """Most bytes of tensors that are allocated at a time inside, beyond those that were before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def times(size: str, mode: str, args: argparse.Namespace) -> None:
    compiled = mode == "compiled"
    ways = WAYS | ({AS_WRITTEN: "plain"} if compiled else {})
    steps = {told: Step(size, way, args, compiled and told != AS_WRITTEN) for told, way in ways.items()}
    taken: dict[str, list[tuple[float, float]]] = {told: [] for told in ways}
    for number in range(-1, args.repeats):  # the first is a warm-up
        for told, step in steps.items():
            seconds = timed(step)
            taken[told] += [seconds] if number >= 0 else []
    for told, seconds in taken.items():
        medians = [statistics.median(own) for own in zip(*seconds, strict=True)]
        print(f"  {mode} {told}: passed {medians[0]:.2f} s, processor {medians[1]:.2f} s")

    def ratio(one: str, other: str) -> float:
        """Median over rounds."""
        clock = CLOCKS.index(args.clock)
        return statistics.median(a[clock] / b[clock] for a, b in zip(taken[one], taken[other], strict=True))

    print(f"  {mode} ours / dense: {ratio('ours', 'dense'):.2f} (goal at most {GOALS[mode]})")
    if compiled:
        print(f"  {AS_WRITTEN} / ours, compiled: {ratio(AS_WRITTEN, 'ours'):.2f} (goal at least {FASTER})")
    print(f"  {mode} plain / ours: {ratio('plain', 'ours'):.2f}", flush=True)


def memory(size: str, args: argparse.Namespace) -> None:
    """Print what forward and backward allocate at most beside the gradients of what learns."""
    found = {}
    for way in ("frozen", "ours", "plain"):
        step = Step(size, way, args)
        step.backward()  # the gradients are there from here on
        found[way] = peak(step.backward)
        print(f"  memory {way}: {found[way] / 1e6:.0f} MB beyond weights, gates, their gradients and optimizer state")
    print(f"  memory ours / dense with frozen weights: {found['ours'] / found['frozen']:.2f} (goal at most {MEMORY})")
    print(f"  memory plain / dense with frozen weights: {found['plain'] / found['frozen']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument(
        "--modes", nargs="+", choices=(*GOALS, "memory"), default=[*GOALS, "memory"], help="default: all"
    )
    parser.add_argument("--depth", type=int, default=12, help="blocks (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the ratios (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="under autocast (default: float32)")
    args = parser.parse_args()
    logging.getLogger("models").setLevel(logging.WARNING)
    if "compiled" in args.modes and shutil.which("g++") is None:
        print("no g++, which torch.compile needs on a CPU: nothing is compiled")
        args.modes.remove("compiled")
    for size in args.sizes:
        print(
            f"{SIZES[size]}, batches of {args.batch_size}, {torch.get_num_threads()} threads, medians of {args.repeats}"
        )
        for mode in args.modes:
            (partial(memory, size) if mode == "memory" else partial(times, size, mode))(args)


if __name__ == "__main__":
    main()
