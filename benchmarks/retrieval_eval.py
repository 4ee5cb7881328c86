"""Retrieval evaluation of XVLM, the candidates of several queries re-ranked together, against the plain formulation:
one query at a time, as published code does it, on texts padded to the longest that the model takes. Bundled captions;
the bundled weights at mini size, random ones at base size. Both begin with the features. Interleaved, medians of the
time that passed and of the time of the processor, which other work on the machine disturbs less.

    python -m benchmarks.retrieval_eval                            # mini size: a minute on two cores
    python -m benchmarks.retrieval_eval --variant base --images 8 --k_test 8 --repeats 3
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.loading import load_config
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.collate import trim_text
from datasets.text import TextEncoder
from engine.evaluation.retrieval import NOT_RANKED, retrieval_scores
from models.xvlm import model as xvlm
from models.xvlm import retrieval as xvlm_retrieval

GOALS = {"mini": 3.0, "base": 1.0}
WEIGHTS = {"mini": "data/xvlm_mini.safetensors", "base": None}
BATCH = 64  # images, and texts, that are encoded together
Texts = dict[str, Tensor]


@torch.no_grad()
def plain_scores(model: nn.Module, images: list[Tensor], texts: Texts, k_test: int) -> tuple[Tensor, Tensor]:
    """Features, then for each image its best texts, then for each text its best images; see `retrieval_scores`."""
    encoded = [model.encode_image(batch) for batch in images]
    tokens, image_feat = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    atts = texts["text_atts"]
    encoded = [model.encode_text(*pair) for pair in zip(texts["text_ids"].split(BATCH), atts.split(BATCH), strict=True)]
    states, text_feat = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    similarity = image_feat @ text_feat.t()
    i2t, t2i = torch.full_like(similarity, NOT_RANKED), torch.full_like(similarity.t(), NOT_RANKED)
    for image, similar in enumerate(similarity):
        best = similar.topk(k_test)
        logits = model.match(states[best.indices], atts[best.indices], tokens[image].repeat(k_test, 1, 1))
        i2t[image, best.indices] = model.pair_scores(logits, best.values)
    for text, similar in enumerate(similarity.t()):
        best = similar.topk(k_test)
        repeated = states[text].repeat(k_test, 1, 1), atts[text].repeat(k_test, 1)
        t2i[text, best.indices] = model.pair_scores(model.match(*repeated, tokens[best.indices]), best.values)
    return i2t, t2i


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=GOALS, default="mini", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=200, help="each with one text (default: %(default)s)")
    parser.add_argument("--k_test", type=int, default=8, help="candidates of a query (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    config = load_config(Path("configs/xvlm") / f"model_{args.variant}.yaml", xvlm.Config)
    torch.manual_seed(0)
    model = xvlm_retrieval.build(config, WEIGHTS[args.variant]).eval()
    scenes = BundledRetrieval(load_glyphs(), "scenes", args.images, side=config.vision.image_size, seed=0)
    encode = TextEncoder(xvlm.tokenizer(config), config.max_tokens, **xvlm_retrieval.TEXT)
    images = torch.stack([scenes[i]["image"] for i in range(args.images)]).split(BATCH)
    padded = encode.plain([scenes.scene(i).caption for i in range(args.images)])
    ways = {
        "plain": partial(plain_scores, model, images, padded, args.k_test),
        "together": partial(retrieval_scores, model, images, trim_text(padded), k_test=args.k_test),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        scores = {}
        for name, way in ways.items():
            begin = time.perf_counter(), time.process_time()
            scores[name] = way()
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        for plain, ours in zip(scores["plain"], scores["together"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    pairs = 2 * args.images * args.k_test
    print(f"XVLM {args.variant}, {args.images} images and texts, {pairs} pairs, {torch.get_num_threads()} threads")
    for clock, number in (("passed", 0), ("processor", 1)):
        plain, ours = ([taken[number] for taken in times[name]] for name in ways)
        rates = [pairs / statistics.median(taken) for taken in (plain, ours)]
        ratio = statistics.median(a / b for a, b in zip(plain, ours, strict=True))
        told = f"together {rates[1]:.0f} pairs/s, plain {rates[0]:.0f}, ratio {ratio:.2f}"
        print(f"{clock}: {told} (goal {GOALS[args.variant]}), equal scores")


if __name__ == "__main__":
    main()
