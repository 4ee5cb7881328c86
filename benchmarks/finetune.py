"""Time of a fine-tuning step of XVLM for retrieval, three ways: the dense model, its mask held by masking gradients,
and its masks multiplied with the weights in every forward pass, as published code does it. Interleaved, medians of the
time that passed and of the time of the processor, which other work on the machine disturbs less.

    python -m benchmarks.finetune                                  # base size: 5 GB of memory, minutes on two cores
    python -m benchmarks.finetune --variant mini --repeats 40
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.loading import load_config
from configs.task import OptimizerConfig
from engine.training.fit import attention
from engine.training.optimizer import finetuning_optimizer
from models.xvlm import model as xvlm
from models.xvlm import retrieval as xvlm_retrieval
from sparsity.masks import Hold, Masks
from sparsity.view import PrunableView

SPARSITY = 0.63
GOAL = 1.03  # held against dense
WAYS = ("dense", "held", "multiplied")
CLOCKS = ("passed", "processor")


def random_batch(config: xvlm.Config, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side, length = config.vision.image_size, config.max_tokens
    ids = torch.randint(5, config.text.vocab_size, (size, length), generator=generator)
    image = torch.randn(size, 3, side, side, generator=generator)
    return {"image": image, "text_ids": ids, "text_atts": torch.ones_like(ids), "sample_ids": torch.arange(size)}


def random_masks(view: PrunableView) -> Masks:
    generator = torch.Generator().manual_seed(0)
    return Masks(
        {name: torch.rand(w.parameter.shape, generator=generator) > SPARSITY for name, w in view.weights.items()}
    )


@contextmanager
def multiplied(view: PrunableView, masks: Masks) -> Iterator[None]:
    """Every prunable layer computes with weight * mask."""
    layers = [(module, masks[name]) for name, weight in view.weights.items() for module in weight.modules]

    def masked(module: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, module.weight * mask, module.bias)

    for module, mask in layers:
        module.forward = partial(masked, module, mask)
    try:
        yield
    finally:
        for module, _ in layers:
            del module.forward


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, autocast: bool, hold: Hold | None) -> None:
    """Take a step of the optimizer as `engine.training.fit` does."""
    torch.manual_seed(0)
    with attention(torch.device("cpu")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch)["loss"]
        loss.backward()
    if hold is not None:
        hold.before_step()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Time that passed, and time of the processor."""
    begin = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=("base", "mini"), default="base", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each way (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="default: %(default)s"
    )
    args = parser.parse_args()
    config = load_config(Path("configs/xvlm") / f"model_{args.variant}.yaml", xvlm.Config)
    torch.manual_seed(0)
    model = xvlm_retrieval.build(config).train()
    view = xvlm_retrieval.prunable_view(model)
    masks = random_masks(view)
    optimizer = finetuning_optimizer(model, OptimizerConfig(1e-6), (), args.precision)
    hold = masks.hold(view, optimizer)
    batch = random_batch(config, args.batch_size)
    once = partial(step, model, optimizer, batch, args.precision == "bf16-mixed")

    def run(way: str) -> None:
        if way == "multiplied":
            with multiplied(view, masks):
                once(None)
        else:
            once(hold if way == "held" else None)

    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(-1, args.repeats):  # the first is a warm-up
        for way in WAYS:
            taken = seconds(partial(run, way))
            times[way] += [taken] if number >= 0 else []
    threads = torch.get_num_threads()
    print(f"XVLM {args.variant}, {view.numel:,} prunable weights, batches of {args.batch_size}, {threads} threads")
    for way in WAYS:
        told = [way + (f" (goal {GOAL})" if way == "held" else "")]
        for name, own, dense in zip(
            CLOCKS, zip(*times[way], strict=True), zip(*times["dense"], strict=True), strict=True
        ):
            ratio = statistics.median(a / b for a, b in zip(own, dense, strict=True))
            told.append(f"{name} {statistics.median(own):.3f} s, {ratio:.3f} x dense")
        print("; ".join(told))


if __name__ == "__main__":
    main()
