"""Sequential Wanda, 2:4, against one pass over the same batches that measures all layers (dense Wanda): vision
transformers of ViT-S's width at several depths, a small LLaVA and a small BLIP. Interleaved, medians; and how often a
block is called for each batch.

    python -m benchmarks.sequential                                     # about ten minutes on two idle cores
    python -m benchmarks.sequential --images 4 --depths 2 4 --repeats 1
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.blip import model as blip
from models.external.model import prunable_view
from models.parts.bert import TextConfig
from sparsity.pattern import NM
from sparsity.replay.replayed import Replayed
from sparsity.replay.trace import units
from sparsity.run.sequential import Blocks, PrunedStages, by_blocks, stages
from sparsity.statistics.passes import collect
from sparsity.view import PrunableView

GOAL, OTHER_GOAL, SPREAD = 2.6, 4.0, 1.2
PATTERN = NM(2, 4)
STATISTIC = "input_norms"
Case = tuple[PrunableView, list[Any]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def vit(depth: int, images: int, batch: int) -> Case:
    model = VisionTransformer(embed_dim=384, depth=depth, num_heads=6).eval()
    return prunable_view(model), list(torch.randn(images, 3, 224, 224).split(batch))


def llava(images: int, batch: int) -> Case:
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **size, "image_size": 112, "patch_size": 14},
        text_config={"model_type": "llama", **size, "num_key_value_heads": 4, "vocab_size": 999},
        image_token_index=998,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((batch, 64), 998), torch.randint(3, 900, (batch, 32))], dim=1)
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return prunable_view(model), [
        {**fields, "pixel_values": torch.randn(batch, 3, 112, 112)} for _ in range(images // batch)
    ]


def bootstrapped(images: int, batch: int) -> Case:
    """BLIP, whose text encoder and decoder share weights."""
    text = {"width": 256, "layers": 6, "fusion_layer": 0, "heads": 4, "mlp_width": 1024, "token_types": False}
    config = blip.Config(
        vision=blip.VisionConfig(image_size=112, width=256, layers=6, heads=4),
        text=TextConfig(vocab_size=1000, **text),
        embed_dim=64,
        queue_size=32,
    )
    ids = torch.randint(5, 900, (batch, 32))
    fields = {"text_ids": ids, "text_atts": torch.ones_like(ids)}
    batches = [{**fields, "image": torch.randn(batch, 3, 112, 112)} for _ in range(images // batch)]
    return blip.prunable_view(blip.build(config).eval()), batches


def choose(name: str, weight: Tensor, norms: Tensor) -> tuple[Tensor, None]:
    return PATTERN.keep(weight.abs().double() * norms.sqrt()), None


def dense(view: PrunableView, batches: list[Any]) -> None:
    found = collect(view, STATISTIC, batches)
    for name, weight in view.weights.items():
        choose(name, weight.matrix(), found[name])


def sequential(view: PrunableView, batches: list[Any]) -> None:
    done = Blocks(view)
    with Replayed(view, lambda: batches, stages(view)) as calls, PrunedStages(view, calls.order, done) as calls.put:
        measure = lambda names: calls.measure(names, [STATISTIC])  # noqa: E731
        prune = lambda name, found: choose(name, view.weights[name].matrix(), found[STATISTIC])  # noqa: E731
        by_blocks(calls.order, measure, prune, done)


@contextmanager
def counted(view: PrunableView, calls: Counter):
    """Count the calls of blocks, of what is within them none."""
    blocks = [module for module in units(view) if any(True for _ in module.children())]

    def counting(module: nn.Module, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[module] += 1
            return forward(*args, **kwargs)

        return call

    for block in blocks:
        vars(block)["forward"] = counting(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]


def compare(name: str, case: Case, goal: float, clock: Callable[[], float], repeats: int) -> float:
    """Print and return how many times as long sequential calibration takes."""
    view, batches = case
    seconds: dict[Callable, list[float]] = {dense: [], sequential: []}
    calls: Counter = Counter()
    with counted(view, calls):
        sequential(view, batches)
    most = max(calls.values()) / len(batches)
    for _ in range(repeats):
        for side in seconds:
            start = clock()
            side(view, batches)
            seconds[side].append(clock() - start)
    one, other = (statistics.median(values) for values in seconds.values())
    print(
        f"{name:10} dense {one:7.2f} s  sequential {other:7.2f} s  {other / one:5.2f} times (goal at most {goal}); a"
        f" block is called at most {most:.2f} times a batch, the traced one included",
        flush=True,
    )
    return other / one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="calibration images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24], help="blocks (default: 6 12 24)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    size, how = (args.images, args.batch), (CLOCKS[args.clock], args.repeats)
    ratios = [compare(f"ViT-S/{depth}", vit(depth, *size), GOAL, *how) for depth in args.depths]
    print(f"largest ratio {max(ratios) / min(ratios):.2f} times the smallest (goal at most {SPREAD})")
    compare("LLaVA", llava(*size), OTHER_GOAL, *how)
    compare("BLIP", bootstrapped(*size), OTHER_GOAL, *how)


if __name__ == "__main__":
    main()
