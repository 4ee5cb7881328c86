"""Zero-shot image-text retrieval: features once, then the best candidates of several queries re-ranked together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configs.decoding import Decoding
from configs.pruning import Evaluation
from datasets.bundled.glyphs import load_glyphs
from datasets.bundled.scenes import BundledRetrieval
from datasets.calibration.data_kinds import skipped_path
from datasets.collate import Skipped, SkippedImages, trim_text
from datasets.images import DEFAULT
from datasets.tasks.retrieval import RetrievalEvalDataset, recall
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform

RECALLS = {f"{way} R@{k}": f"{prefix}_r{k}" for way, prefix in (("i2t", "txt"), ("t2i", "img")) for k in (1, 5, 10)}
NOT_RANKED = -100.0  # score of the candidates that the contrastive similarity left out
READ = 64  # images read together


class ZeroShot:
    """Recalls of a model, in per cent, as it is when this is called; the ranks share the re-ranking.

    encode: of the captions. vision: has the model's `image_size`, in pixels. Images that cannot be read are listed in
    `folder` and count as not found; more than `max_skipped` of them is an error.
    decoding: how image files become pictures.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluation: Evaluation,
        encode: TextEncoder,
        fabric: Any,
        vision: Any,
        folder: Path,
        *,
        workers: int = 0,
        max_skipped: float = 0.01,
        decoding: Decoding = DEFAULT,
    ):
        self.model, self.k_test, self.fabric = model, evaluation.k_test, fabric
        self.items, captions, self.txt2img, self.img2txt = _open(evaluation, vision.image_size, decoding)
        self.texts = trim_text(encode.plain(captions))
        gather = partial(_stack, side=vision.image_size)
        self.images = DataLoader(self.items, READ, num_workers=workers, collate_fn=gather)
        self.skipped = SkippedImages(skipped_path(folder, fabric.global_rank), len(self.items), max_skipped)

    def __call__(self) -> dict[str, float]:
        shared = self.fabric.world_size > 1
        # The scores of bf16 have few digits: many would be equal, which counts against the match.
        with torch.autocast(self.fabric.device.type, enabled=False):
            scores = retrieval_scores(
                self.model,
                self._read(),
                self.texts,
                k_test=self.k_test,
                device=self.fabric.device,
                share=(self.fabric.global_rank, self.fabric.world_size),
                reduce=partial(self.fabric.all_reduce, reduce_op="sum") if shared else None,
                progress=partial(self._progress, desc="re-ranking"),
            )
        return recall(*scores, self.txt2img, self.img2txt)

    def _read(self) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) of all images, NaN for those that cannot be read."""
        self.skipped.count = 0  # the same images at each call
        for batch in self._progress(self.images, desc="images"):
            self.skipped.add(batch["skipped"])
            yield batch["image"]

    def _progress(self, batches: Iterable, desc: str) -> Iterable:
        return tqdm(batches, desc=desc, unit="batch", leave=False, disable=not self.fabric.is_global_zero)


def _open(
    evaluation: Evaluation, side: int, decoding: Decoding
) -> tuple[Dataset, list[str], list[int], list[list[int]]]:
    """Images, captions, and which belong together: for each caption its image, for each image its captions."""
    if evaluation.files:
        found = evaluation.files.annotations, evaluation.files.images
        files = RetrievalEvalDataset(*found, EvalTransform(side), evaluation.limit, decoding)
        return files, files.texts, files.txt2img, files.img2txt
    number = min(evaluation.bundled_scenes, evaluation.limit or evaluation.bundled_scenes)
    split, seed = evaluation.bundled_split, evaluation.bundled_seed
    scenes = BundledRetrieval(load_glyphs(), split, number, side=side, seed=seed)
    own = list(range(len(scenes)))
    return scenes, [scenes.scene(i).caption for i in own], own, [[i] for i in own]


def _stack(items: Sequence[Mapping[str, Any] | Skipped], side: int) -> dict[str, Any]:
    """Images (B, 3, side, side), NaN where one cannot be read, and which those are."""
    unread = torch.full((3, side, side), torch.nan)
    images = [unread if isinstance(item, Skipped) else item["image"].to("cpu") for item in items]
    return {"image": torch.stack(images), "skipped": [item for item in items if isinstance(item, Skipped)]}


@torch.no_grad()
def retrieval_scores(
    model: nn.Module,
    images: Iterable[Tensor],
    texts: Mapping[str, Tensor],
    *,
    k_test: int,
    device: Any = None,
    batch_size: int = 128,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Scores of all image-text pairs both ways, in float32 and evaluation mode.

    model gives `encode_image`, `encode_text`, `match` and `pair_scores` (see models/xvlm/model.py). images: batches
    (B, 3, H, W). texts: `text_ids`, `text_atts` (N, T). k_test: candidates of each query that the ITM head re-ranks,
    the others get -100; 0 scores by contrastive similarity alone. share: (rank, ranks), of which this one re-ranks its
    part of the queries; reduce: sums a tensor over them. progress: wraps the batches to re-rank, as tqdm does. Returns
    (I, N) and (N, I), on the CPU; NaN stays NaN.
    """
    was_training = model.training
    model.eval()
    try:
        encoded = [model.encode_image(batch.to(device)) for batch in images]
        tokens, image_feat = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        pairs = zip(texts["text_ids"].split(batch_size), texts["text_atts"].split(batch_size), strict=True)
        encoded = [model.encode_text(ids.to(device), atts.to(device)) for ids, atts in pairs]
        states, text_feat = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        atts = texts["text_atts"].to(device)
        similarity = image_feat @ text_feat.t()  # (I, N)
        if not k_test:
            return similarity.cpu(), similarity.t().cpu()
        lengths = atts.sum(1)

        def matched(image: Tensor, text: Tensor) -> Tensor:
            longest = lengths[text].max()  # padding costs time and changes nothing
            logits = model.match(states[text, :longest], atts[text, :longest], tokens[image])
            return model.pair_scores(logits, similarity[image, text])

        scores = _rerank(similarity, k_test, matched, lengths, batch_size, share, progress)
        i2t, t2i = (reduce(way) if reduce else way for way in scores)
        unread = similarity.isnan()
        return i2t.masked_fill(unread, torch.nan).cpu(), t2i.masked_fill(unread, torch.nan).t().cpu()
    finally:
        model.train(was_training)


def _rerank(
    similarity: Tensor,
    k_test: int,
    matched: Callable[[Tensor, Tensor], Tensor],
    lengths: Tensor,
    batch_size: int,
    share: tuple[int, int],
    progress: Callable[[Sequence], Iterable],
) -> tuple[Tensor, Tensor]:
    """`matched(images, texts)` for the best `k_test` texts of each image, and for the best images of each text, -100
    for the others, each (I, N); 0 for what other ranks do. A pair that is among both is matched once, and texts of the
    same length stand together.
    """
    rank, ranks = share
    known = similarity.nan_to_num(nan=-torch.inf)  # topk takes NaN for the best of all
    chosen = _best(known, k_test), _best(known.t(), k_test).t()
    images, texts = (chosen[0] | chosen[1]).nonzero(as_tuple=True)
    order = lengths[texts].argsort(stable=True)[rank::ranks]
    pairs = zip(images[order].split(batch_size), texts[order].split(batch_size), strict=True)
    scores = torch.zeros_like(similarity)
    for image, text in progress(list(pairs)):
        scores[image, text] = matched(image, text).to(scores.dtype)
    others = 0.0 if rank else NOT_RANKED
    return scores.masked_fill(~chosen[0], others), scores.masked_fill(~chosen[1], others)


def _best(similarity: Tensor, k_test: int) -> Tensor:
    """Which columns are the best `k_test` of each row."""
    best = similarity.topk(min(k_test, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)
