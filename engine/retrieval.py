"""Zero-shot image-text retrieval: features once, then the best candidates of several queries re-ranked together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.bundled import BundledRetrieval, load_glyphs
from datasets.calibration import skipped_path
from datasets.collate import Skipped, SkippedImages, trim_text
from datasets.retrieval import RetrievalEvalDataset, recall
from datasets.sources import Evaluation
from datasets.text import TextEncoder
from datasets.transforms import EvalTransform

RECALLS = {f"{way} R@{k}": f"{prefix}_r{k}" for way, prefix in (("i2t", "txt"), ("t2i", "img")) for k in (1, 5, 10)}
NOT_RANKED = -100.0  # score of the candidates that the contrastive similarity left out
READ = 64  # images read together


class ZeroShot:
    """Recalls of a model, in per cent, as it is when this is called; the ranks share the re-ranking.

    encode: of the captions. vision: has the model's `image_size`, in pixels. Images that cannot be read are listed in
    `folder` and count as not found; more than `max_skipped` of them is an error.
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
    ):
        self.model, self.k_test, self.fabric = model, evaluation.k_test, fabric
        self.items, captions, self.txt2img, self.img2txt = _open(evaluation, vision.image_size)
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


def _open(evaluation: Evaluation, side: int) -> tuple[Dataset, list[str], list[int], list[list[int]]]:
    """Images, captions, and which belong together: for each caption its image, for each image its captions."""
    if evaluation.files:
        found = evaluation.files.annotations, evaluation.files.images
        files = RetrievalEvalDataset(*found, EvalTransform(side), evaluation.limit)
        return files, files.texts, files.txt2img, files.img2txt
    number = min(evaluation.bundled_scenes, evaluation.limit or evaluation.bundled_scenes)
    split, seed = evaluation.bundled_split, evaluation.bundled_seed
    scenes = BundledRetrieval(load_glyphs(), split, number, side=side, seed=seed)
    own = list(range(len(scenes)))
    return scenes, [scenes.scene(i).caption for i in own], own, [[i] for i in own]


def _stack(items: Sequence[Mapping[str, Any] | Skipped], side: int) -> dict[str, Any]:
    """Images (B, 3, side, side), NaN where one cannot be read, and which those are."""
    unread = torch.full((3, side, side), torch.nan)
    images = [unread if isinstance(item, Skipped) else item["image"] for item in items]
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

    model gives `encode_image`, `encode_text`, `match` and `pair_scores` (see models/xvlm.py). images: batches
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

        def matched(image: Tensor, text: Tensor) -> Tensor:
            logits = model.match(states[text], atts[text], tokens[image])
            return model.pair_scores(logits, similarity[image, text])

        def ranked(similarity: Tensor, matched: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            scores = _rerank(similarity, k_test, matched, batch_size, share, progress)
            scores = reduce(scores) if reduce else scores
            return scores.masked_fill_(similarity.isnan(), torch.nan).cpu()

        return ranked(similarity, matched), ranked(similarity.t(), lambda text, image: matched(image, text))
    finally:
        model.train(was_training)


def _rerank(
    similarity: Tensor,
    k_test: int,
    matched: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
    share: tuple[int, int],
    progress: Callable[[Sequence], Iterable],
) -> Tensor:
    """`matched(rows, columns)` for the best `k_test` of each row, -100 for the others; rows of other ranks are 0."""
    rank, ranks = share
    own = torch.arange(len(similarity), device=similarity.device)[rank::ranks]
    scores = torch.zeros_like(similarity)
    scores[own] = NOT_RANKED
    known = similarity[own].nan_to_num(nan=-torch.inf)  # topk takes NaN for the best of all
    best = known.topk(min(k_test, similarity.shape[1]), dim=1).indices
    rows, columns = own.repeat_interleave(best.shape[1]), best.flatten()
    for r, c in progress(list(zip(rows.split(batch_size), columns.split(batch_size), strict=True))):
        scores[r, c] = matched(r, c).to(scores.dtype)
    return scores
