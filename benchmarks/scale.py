"""A random LLaVA-like model in bfloat16, from a folder of shards, pruned by prune.py on 16 images with captions: the
peak of anonymous memory (and of the accelerator's), seconds, and whether the time of a block stays the same.

    python -m benchmarks.scale                          # 0.05 B weights: about 3 minutes on one idle core
    python -m benchmarks.scale --full                   # 1.4 B weights
    python -m benchmarks.scale --full --accelerator gpu --limit 240
    python -m benchmarks.scale --preflight              # only what 7 B weights would need, without them

A plan is what follows `prune.py -m hf:FOLDER`. Each is a process of its own, whose RssAnon is read until it ends
(mapped files do not count). Allowed are the bytes of the model and `ALLOWED`. Seconds of a block are those between two
lines of its log, on a CPU those that the process has computed; those of the language model, all of one size, are
compared: the median of the last third over that of the first. --limit: seconds for all; what does not fit is left out
and named. Pictures are not drawn.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
import transformers
from lightning.fabric import Fabric
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import prune
import pruners
from engine.reports.pictures import Pictures
from models.external.model import prunable_view
from sparsity.pattern import parse_pattern
from sparsity.run.memory import demand_of, preflight_bytes
from sparsity.run.request import Request

PLANS = {
    "wanda": "-p wanda -s 50",
    "sparsegpt 2:4": "-p sparsegpt --pattern 2:4",
    "magnitude + lsq": "-p magnitude -s 50 --reconstruct lsq --rounds 30",
}
ALLOWED = 3e9  # bytes above the model's
IMAGES, SIDE, PATCH = 16, 112, 14
WORDS = ("a", "photo", "of", "red", "cat", "dog", "small", "two", "on", "the", "grass", "near", "blue", "house")
INTERVAL = 0.01  # seconds between two readings


@dataclass(frozen=True)
class Size:
    """Hold sizes: width, inner width, layers, heads and words of the language model; the same of the vision tower."""

    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    words: int
    shard: str


SMALL = Size((512, 1408, 12, 8), (256, 1024, 6, 4), 8_000, "30MB")
FULL = Size((2048, 5632, 24, 16), (1024, 4096, 12, 16), 32_000, "500MB")  # 1.4 B
LARGE = Size((4096, 11008, 32, 32), (1024, 4096, 24, 16), 32_064, "5GB")  # LLaVA of 7 B


def config(size: Size) -> transformers.LlavaConfig:
    """The configuration of a LLaVA of this size."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text, vision = (dict(zip(names, numbers, strict=True)) for numbers in (size.text, size.vision))
    text |= {"vocab_size": size.words, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": SIDE, "patch_size": PATCH},
        text_config={"model_type": "llama", **text, "max_position_embeddings": 512},
        image_token_index=3,
    )


def make(size: Size, folder: Path, accelerator: str) -> None:
    """Write the model, its processor, and images with captions."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with Fabric(accelerator=accelerator, devices=1).device:
        model = transformers.LlavaForConditionalGeneration(config(size))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model", max_shard_size=size.shard)
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<image>", "<unk>", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, **special, additional_special_tokens=["<image>"], model_max_length=512
    )
    side = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessor(size=side, crop_size=side)
    how = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokens, **how).save_pretrained(folder / "model")
    drawn = np.random.default_rng(0)
    (folder / "images").mkdir()
    captions = {}
    for i in range(IMAGES):
        pixels = drawn.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        captions[f"{i}.png"] = " ".join(drawn.choice(WORDS, 24))
    (folder / "images" / "captions.json").write_text(json.dumps(captions))


@dataclass
class Run:
    """Keep what is seen of a process. blocks: seconds of each. peak: bytes that no file backs; device: of it."""

    seconds: float = 0.0
    blocks: list[float] = field(default_factory=list)
    peak: int = 0
    device: int = 0
    code: int = 0
    last: str = ""


def measured(plan: str, folder: Path, accelerator: str, limit: float) -> Run:
    """Run a plan in a process of its own, and watch it."""
    given = f"-m hf:{folder / 'model'} {plan} --calibration {folder / 'images'} --batch_size 4 --num_batches 4"
    given += f" --verbose --accelerator {accelerator} --output_dir {folder / 'out'}"
    command = [sys.executable, "-m", "benchmarks.scale", "--run", given]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "HF_HUB_OFFLINE": "1"}
    run, begin, times = Run(), time.perf_counter(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout, "it is a pipe"
        clock = time.perf_counter if accelerator == "gpu" else partial(processor_seconds, process.pid)
        reader = threading.Thread(target=_read, args=(process.stdout, clock, times, run))
        reader.start()
        while process.poll() is None:
            run.peak = max(run.peak, anonymous(process.pid))
            if time.perf_counter() - begin > limit:
                process.kill()
                run.last = f"longer than {limit:.0f} s"
            time.sleep(INTERVAL)
        reader.join()
    run.seconds, run.code = time.perf_counter() - begin, process.returncode
    run.blocks = [after - before for before, after in zip(times, times[1:], strict=False)]
    return run


def _read(lines: IO[str], clock: Callable[[], float], times: list[float], run: Run) -> None:
    """Note when the lines of the log come in which a block begins."""
    for line in lines:
        found = re.search(r"block (\d+) of (\d+)", line)
        if found:
            times.append(clock())
        elif line.startswith("device peak "):
            run.device = int(line.split()[-1])
        run.last = line.strip() or run.last


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs; 0 once it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return 1024 * int(line.split()[1])
    return 0


def processor_seconds(pid: int) -> float:
    """Return the time that a process has computed, without the processes that it has started."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def flatness(blocks: list[float], layers: int) -> float:
    """The median time of the last third of the language model's blocks over that of the first third."""
    own = blocks[-layers + 1 :] if len(blocks) >= layers else blocks  # the last block ends with the run
    third = len(own) // 3
    return statistics.median(own[-third:]) / statistics.median(own[:third]) if third else math.nan


def preflight(size: Size) -> Iterator[str]:
    """Return what the plans need beside the weights, from shapes alone."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config(size))
    torch.set_default_dtype(torch.float32)
    view = prunable_view(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    told = f"{weights / 1e9:.2f} B weights in bfloat16, {2 * weights / 1e9:.1f} GB, on an accelerator"
    yield f"\n{told}; beside them at most"
    yield "\n| plan | device, GB | host, GB |\n|---|---|---|"
    for name, request, options in (
        ("wanda", Request([0.5]), {}),
        ("sparsegpt", Request(pattern=parse_pattern("2:4")), {}),
        ("magnitude", Request([0.5]), {"reconstruct": "lsq"}),
    ):
        needed = preflight_bytes(demand_of(pruners.build(name, **options).plan, request), view)
        yield f"| {name} | {needed.device / 1e9:.1f} | {needed.host / 1e9:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="1.4 B weights (default: 0.05 B)")
    parser.add_argument("--preflight", action="store_true", help="only those of 7 B (default: no)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="default: all")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all (default: none)")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on a disk, for model and results (default: temporary)"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        Pictures.draw = lambda self, title: []
        prune.main(args.run.split())
        print(f"device peak {torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}")
        return
    if not args.preflight:
        table(args)
    for line in preflight(LARGE):
        print(line, flush=True)


def table(args: argparse.Namespace) -> None:
    """Make the model, run the plans, print a line for each."""
    begin, size = time.perf_counter(), FULL if args.full else SMALL
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        make(size, folder, args.accelerator)
        files = list((folder / "model").glob("*.safetensors"))
        model = sum(path.stat().st_size for path in files)
        made = time.perf_counter() - begin
        print(f"{model / 2e9:.2f} B weights, {model / 1e9:.2f} GB in {len(files)} shards, made in {made:.0f} s")
        print("\n| plan | s | anonymous GB | allowed | device GB | s a block | last / first third |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for name in args.plans:
            run = measured(PLANS[name], folder, args.accelerator, args.limit - (time.perf_counter() - begin))
            if run.code:
                print(f"| {name} | failed: {run.last} |", flush=True)
                continue
            block = f"{statistics.median(run.blocks):.2f}" if run.blocks else "-"
            flat = f"{flatness(run.blocks, size.text[2]):.2f}" if run.blocks else "-"
            memory = f"{run.peak / 1e9:.2f} | {(model + ALLOWED) / 1e9:.2f} | {run.device / 1e9:.2f}"
            print(f"| {name} | {run.seconds:.0f} | {memory} | {block} | {flat} |", flush=True)


if __name__ == "__main__":
    main()
