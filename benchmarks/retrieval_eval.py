"""Re-ranking of XVLM's retrieval evaluation, image by image, against other orders of the pairs: in batches of texts of
one length, which project the image anew for each pair ("length", ours before), and one query at a time on padded texts,
as published code does it ("query"). Bundled captions, whose length is that of COCO's; the bundled weights at mini size,
random ones at base size, images of 384 pixels. All begin with the image tokens. Interleaved, medians of the time that
passed and of the time of the processor, which other work on the machine disturbs less.

    python -m benchmarks.retrieval_eval                            # mini size, against "query": a minute on two cores
    python -m benchmarks.retrieval_eval --variant base             # against "length": five minutes on two cores
    python -m benchmarks.retrieval_eval --memory                   # host memory for COCO's 5,000 x 25,010: seconds
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.loading import load_config
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.collate import trim_text
from datasets.text import TextEncoder
from engine.evaluation.reranking import NOT_RANKED, retrieval_scores
from models.xvlm import model as xvlm
from models.xvlm import retrieval as xvlm_retrieval

BATCH = 128  # pairs of an order by length, texts that are encoded together
COCO = (5000, 25010, 11.8)  # images, texts and the mean of their tokens in Karpathy's test split
STAND_IN = (1000, 5002)
Texts = dict[str, Tensor]
Scores = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """side: of the images, in pixels. images, texts: how many. k_test: candidates of a query. other: order to compare
    with. goal: how many times as many pairs per second.
    """

    weights: str | None
    side: int
    images: int
    texts: int
    k_test: int
    other: str
    goal: float


CASES = {
    "mini": Case("data/xvlm_mini.safetensors", 96, 200, 200, 8, "query", 3.0),
    "base": Case(None, 384, 6, 64, 64, "length", 3.0),
}


@torch.no_grad()
def by_length(model: nn.Module, images: Tensor, texts: Texts, k_test: int) -> Scores:
    """All candidates in the order of their lengths, each with the tokens of its image."""
    tokens, states, similarity = encoded(model, images, texts)
    chosen = [torch.zeros_like(way, dtype=torch.bool) for way in (similarity, similarity.t())]
    for way, marks in zip((similarity, similarity.t()), chosen, strict=True):
        marks.scatter_(1, way.topk(min(k_test, way.shape[1]), dim=1).indices, True)
    i2t, t2i = chosen[0], chosen[1].t()
    atts = texts["text_atts"]
    lengths, (image, text) = atts.sum(1), (i2t | t2i).nonzero(as_tuple=True)
    scores = torch.full_like(similarity, NOT_RANKED)
    for rows in lengths[text].argsort(stable=True).split(BATCH):
        own, longest = text[rows], int(lengths[text[rows]].max())
        logits = model.match(states[own, :longest], atts[own, :longest], tokens[image[rows]])
        scores[image[rows], own] = model.pair_scores(logits, similarity[image[rows], own])
    return scores.masked_fill(~i2t, NOT_RANKED), scores.masked_fill(~t2i, NOT_RANKED).t()


@torch.no_grad()
def by_query(model: nn.Module, images: Tensor, texts: Texts, k_test: int) -> Scores:
    """For each image its best texts, then for each text its best images."""
    tokens, states, similarity = encoded(model, images, texts)
    atts = texts["text_atts"]
    i2t, t2i = torch.full_like(similarity, NOT_RANKED), torch.full_like(similarity.t(), NOT_RANKED)
    for image, similar in enumerate(similarity):
        best = similar.topk(min(k_test, len(similar)))
        repeated = tokens[image].repeat(len(best.indices), 1, 1)
        logits = model.match(states[best.indices], atts[best.indices], repeated)
        i2t[image, best.indices] = model.pair_scores(logits, best.values)
    for text, similar in enumerate(similarity.t()):
        best = similar.topk(min(k_test, len(similar)))
        repeated = [part[text].expand(len(best.indices), *part[text].shape) for part in (states, atts)]
        t2i[text, best.indices] = model.pair_scores(model.match(*repeated, tokens[best.indices]), best.values)
    return i2t, t2i


ORDERS = {"length": by_length, "query": by_query}


def encoded(model: nn.Module, images: Tensor, texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens (I, L, V), states of the texts (N, T, D), similarities (I, N)."""
    tokens, image_feat = model.encode_image(images)
    batches = zip(texts["text_ids"].split(BATCH), texts["text_atts"].split(BATCH), strict=True)
    states, text_feat = (torch.cat(parts) for parts in zip(*(model.encode_text(*b) for b in batches), strict=True))
    return tokens, states, image_feat @ text_feat.t()


def timed(case: Case, variant: str, repeats: int) -> None:
    """Print pairs per second of both orders and their ratio."""
    config = load_config(Path("configs/xvlm") / f"model_{variant}.yaml", xvlm.Config)
    config = replace(config, vision=replace(config.vision, image_size=case.side))
    torch.manual_seed(0)
    model = xvlm_retrieval.build(config, case.weights).eval()
    scenes = BundledRetrieval(load_glyphs(), "scenes", max(case.images, case.texts), side=case.side, seed=0)
    encode = TextEncoder(xvlm.tokenizer(config), config.max_tokens, **xvlm_retrieval.TEXT)
    images = torch.stack([scenes[i]["image"] for i in range(case.images)])
    padded = encode.plain([scenes.scene(i).caption for i in range(case.texts)])
    with torch.no_grad():
        parts = [model.encode_image(batch) for batch in images.split(8)]
    known = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    model.encode_image = lambda _: known
    texts = padded if case.other == "query" else trim_text(padded)
    ways: dict[str, Callable[[], Scores]] = {
        f"by {case.other}": partial(ORDERS[case.other], model, images, texts, case.k_test),
        "by image": partial(retrieval_scores, model, [images], trim_text(padded), k_test=case.k_test),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        scores = {}
        for name, way in ways.items():
            begin = time.perf_counter(), time.process_time()
            scores[name] = way()
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        other, ours = scores.values()
        for actual, expected in zip(ours, other, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    pairs = int(((ours[0] != NOT_RANKED) | (ours[1].t() != NOT_RANKED)).sum())
    shape = f"{case.images} images of {case.side} pixels, {case.texts} texts"
    print(f"XVLM {variant}, {shape}, {pairs} pairs, {torch.get_num_threads()} threads; scores equal to 1e-5")
    for clock, number in (("passed", 0), ("processor", 1)):
        plain, own = ([taken[number] for taken in times[name]] for name in ways)
        rates = [pairs / statistics.median(taken) for taken in (own, plain)]
        ratio = statistics.median(a / b for a, b in zip(plain, own, strict=True))
        told = f"by image {rates[0]:.1f} pairs/s, by {case.other} {rates[1]:.1f}"
        print(f"{clock}: {told}, ratio {ratio:.2f} (goal {case.goal})", flush=True)


class StandIn(nn.Module):
    """Encodes and matches nothing, so that what is left are the tables of the evaluation itself."""

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(image), 1, 1), torch.randn(len(image), 8)

    def encode_text(self, ids: Tensor, atts: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(*ids.shape, 1), torch.randn(len(ids), 8)

    def project_image(self, tokens: Tensor) -> Tensor:
        return tokens

    def match(self, states: Tensor, atts: Tensor, image: Tensor) -> Tensor:
        return torch.zeros(len(states), 2)

    def pair_scores(self, logits: Tensor, similarity: Tensor) -> Tensor:
        return similarity


TABLES = 17  # bytes a pair: similarity, scores, both ways in float32, five times a bool


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measured(images: int, texts: int, k_test: int) -> int:
    """The most bytes that an evaluation of so many stand-ins takes."""
    ids = torch.ones(texts, 2, dtype=torch.long)
    batches = [torch.zeros(100, 1)] * (images // 100)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    retrieval_scores(StandIn(), batches, {"text_ids": ids, "text_atts": ids}, k_test=k_test)
    done.set()
    watcher.join()
    return peak - before


def memory() -> None:
    """Print what COCO's test split takes on the host, from shapes, and how far that is from a smaller stand-in."""
    config, (images, texts, length) = xvlm.Config(), COCO
    vision = replace(config.vision, image_size=384)
    tokens = 4 * images * vision.tokens * vision.width
    tables = TABLES * images * texts
    print(f"{images} images of 384 pixels x {texts} texts, in GB:")
    print(f"  image tokens {tokens / 1e9:.1f}, with half_tokens {tokens / 2e9:.1f}; over n devices 1/n on each")
    print(f"  tables {tables / 1e9:.1f} ({TABLES} bytes a pair), on each device's host")
    states = 4 * texts * length * config.text.width
    print(f"  states of the texts {states / 1e9:.1f}, on the device (without padding, {length} tokens on average)")
    print(f"  host in all {(tokens + tables) / 1e9:.1f}, with half_tokens {(tokens / 2 + tables) / 1e9:.1f}")
    expected, found = TABLES * STAND_IN[0] * STAND_IN[1], measured(*STAND_IN, k_test=256)
    print(
        f"tables of a stand-in of {STAND_IN[0]} x {STAND_IN[1]}: {found / 1e6:.0f} MB, from shapes {expected / 1e6:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=CASES, default="mini", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--memory", action="store_true", help="host memory only")
    args = parser.parse_args()
    memory()  # first: afterwards the process has memory that it can use again
    if not args.memory:
        timed(CASES[args.variant], args.variant, args.repeats)


if __name__ == "__main__":
    main()
