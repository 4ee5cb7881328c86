"""Zero-shot image-text retrieval: features once, then the best candidates of several queries re-ranked together."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NOT_RANKED = -100.0  # score of the candidates that the contrastive similarity left out


@torch.no_grad()
def retrieval_scores(
    model: nn.Module,
    images: Iterable[Tensor],
    texts: dict[str, Tensor],
    *,
    k_test: int,
    device: Any = None,
    batch_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Scores of all image-text pairs both ways, in float32 and evaluation mode.

    model gives `encode_image`, `encode_text` and `match` (see models/xvlm.py). images: batches (B, 3, H, W). texts:
    `text_ids`, `text_atts` (N, T). k_test: candidates of each query that the ITM head re-ranks by its positive logit,
    the others get -100; 0 scores by contrastive similarity alone. Returns (I, N) and (N, I), on the CPU.
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
            return model.match(states[text], atts[text], tokens[image])[:, 1]

        i2t = _rerank(similarity, k_test, matched, batch_size)
        t2i = _rerank(similarity.t(), k_test, lambda text, image: matched(image, text), batch_size)
        return i2t.cpu(), t2i.cpu()
    finally:
        model.train(was_training)


def _rerank(similarity: Tensor, k_test: int, matched: Any, batch_size: int) -> Tensor:
    """Replace the best `k_test` similarities of each row by `matched(rows, columns)`, the others by -100."""
    scores = torch.full_like(similarity, NOT_RANKED)
    best = similarity.topk(min(k_test, similarity.shape[1]), dim=1).indices
    rows = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
    columns = best.flatten()
    for r, c in zip(rows.split(batch_size), columns.split(batch_size), strict=True):
        scores[r, c] = matched(r, c).to(scores.dtype)
    return scores


def batches_of(items: Sequence[dict[str, Any]], batch_size: int = 128) -> Iterable[Tensor]:
    """The "image" of each item, stacked in batches (B, 3, H, W)."""
    for first in range(0, len(items), batch_size):
        yield torch.stack([items[i]["image"] for i in range(first, min(first + batch_size, len(items)))])
