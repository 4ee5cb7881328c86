"""Scores of image-text pairs in retrieval: features once, then all texts that are candidates of an image re-ranked
together.

Shapes: I images, N texts, L image tokens, T text tokens, V vision width, D text width, E embedding width.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError

log = logging.getLogger(__name__)

NOT_RANKED = -100.0  # score of the candidates that the contrastive similarity left out
PAIRS = 256  # pairs of an image re-ranked together
ROWS = 1024  # queries whose candidates are chosen together
CHECKED = 4  # images that are also re-ranked in full precision, to tell the difference of half


@dataclass(frozen=True)
class Share:
    """The part of one process in an evaluation: the images `own`; `total` sums a tensor over all processes."""

    own: Sequence[int]
    total: Callable[[Tensor], Tensor]


@torch.no_grad()
def retrieval_scores(
    model: nn.Module,
    images: Iterable[Tensor],
    texts: Mapping[str, Tensor],
    *,
    k_test: int,
    device: Any = None,
    batch_size: int = PAIRS,
    share: Share | None = None,
    half: bool = False,
    progress: Callable[[Sequence], Iterable] = iter,
) -> tuple[Tensor, Tensor]:
    """Scores of all image-text pairs both ways, in evaluation mode: (I, N) and (N, I), float32 on the CPU.

    Each process encodes the images of its share and re-ranks their candidates; image tokens stay with it, on the host.
    Texts are encoded by each: their states are needed everywhere, and cost less to compute than to send. NaN stays NaN.

    Args:
        model: gives `encode_image`, `encode_text`, `project_image`, `match` and `pair_scores`, as models/xvlm/model.py.
        images: batches (B, 3, H, W), of the images of the share in its order.
        texts: `text_ids`, `text_atts` (N, T).
        k_test: candidates of each query that the ITM head re-ranks, the others get -100; 0 scores by contrastive
            similarity alone.
        batch_size: texts that are encoded, and pairs of an image that are re-ranked together.
        share: of this process; None where it is alone.
        half: image tokens are held in float16; logs by how much that changes the scores.
        progress: wraps the images to re-rank, as tqdm does.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = _ImageTokens(half) if k_test else None
        image_feat = _encode_images(model, images, device, tokens)
        encoded = _Texts(model, texts, device, batch_size)
        own = range(len(image_feat)) if share is None else share.own
        if share is not None:
            image_feat = _of_all(image_feat, encoded.features.shape[1], share)
        with torch.autocast(encoded.features.device.type, enabled=False):
            similarity = (image_feat.float() @ encoded.features.float().t()).cpu()  # (I, N)
        if not k_test:
            return similarity, similarity.t()
        chosen = _best(similarity, k_test), _best(similarity.t(), k_test).t()
        scores = torch.zeros_like(similarity)
        reranking = _Reranking(model, encoded, tokens, similarity, chosen[0] | chosen[1], batch_size)
        for place, number in enumerate(progress(list(own))):
            reranking.score(place, number, scores[number])
        reranking.tell()
        return _both_ways(scores if share is None else share.total(scores), chosen, similarity.isnan())
    finally:
        model.train(was_training)


def _of_all(own: Tensor, width: int, share: Share) -> Tensor:
    """Features (I, E) of all images, from those of each process."""
    count = int(share.total(torch.tensor(float(len(share.own)))))
    features = torch.zeros(count, width)
    features[torch.tensor(share.own, dtype=torch.long)] = own.float().cpu().reshape(-1, width)
    return share.total(features).to(own.device)


def _both_ways(scores: Tensor, chosen: tuple[Tensor, Tensor], unread: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of what each way has chosen, -100 for the others, NaN for what has no similarity: (I, N) and (N, I)."""
    i2t, t2i = scores.clone(), scores
    for way, kept in zip((i2t, t2i), chosen, strict=True):
        way.masked_fill_(~kept, NOT_RANKED).masked_fill_(unread, torch.nan)
    return i2t, t2i.t()


def _best(similarity: Tensor, k_test: int) -> Tensor:
    """Which columns are the best `k_test` of each row."""
    chosen = torch.zeros(similarity.shape, dtype=torch.bool)
    for rows, marks in zip(similarity.split(ROWS), chosen.split(ROWS), strict=True):
        known = rows.nan_to_num(nan=-torch.inf)  # topk takes NaN for the best of all
        marks.scatter_(1, known.topk(min(k_test, known.shape[1]), dim=1).indices, True)
    return chosen


def _encode_images(model: nn.Module, images: Iterable[Tensor], device: Any, tokens: "_ImageTokens | None") -> Tensor:
    """Features (I, E) of images, on the device; their tokens are added to `tokens`."""
    features = []
    for batch in images:
        found, feature = model.encode_image(batch.to(device))
        features.append(feature)
        if tokens is not None:
            tokens.add(found)
    return torch.cat(features) if features else torch.empty(0, 0, device=device)


class _ImageTokens:
    """Tokens (L, V) of each image on the host; half: in float16, but for the first `CHECKED`, which are also kept as
    they are.
    """

    def __init__(self, half: bool):
        self.half, self.batches, self.places = half, [], []
        self.exact: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Add the image tokens of a batch, (B, L, V). UserError where float16 cannot hold them."""
        tokens = tokens.cpu()
        self.dtype = tokens.dtype
        if self.half:
            self.exact += [row.clone() for row in tokens[: max(0, CHECKED - len(self.exact))]]
            tokens = tokens.half()
            if tokens.isinf().any():
                raise UserError("half_tokens: float16 cannot hold the image tokens of this model: leave it out")
        self.places += [(len(self.batches), row) for row in range(len(tokens))]
        self.batches.append(tokens)  # one tensor of all would be there twice while it is put together

    def __getitem__(self, place: int) -> Tensor:
        batch, row = self.places[place]
        return self.batches[batch][row].to(self.dtype)


class _Texts:
    """Features (N, E) of texts, and their states without padding, one text after the other."""

    def __init__(self, model: nn.Module, texts: Mapping[str, Tensor], device: Any, batch_size: int):
        ids, atts = texts["text_ids"], texts["text_atts"]
        self.lengths = atts.sum(1)
        order = self.lengths.argsort(stable=True)  # padding costs time and changes nothing
        states, features = [], []
        for rows in order.split(batch_size):
            longest = int(self.lengths[rows].max())
            batch = ids[rows, :longest].to(device), atts[rows, :longest].to(device)
            found, feature = model.encode_text(*batch)
            states.append(found[batch[1].bool()])  # (sum of lengths, D), or of ids
            features.append(feature)
        self.states = torch.cat(states)
        self.features = torch.cat(features)[order.argsort().to(self.states.device)]
        self.begin = torch.empty_like(self.lengths)
        self.begin[order] = self.lengths[order].cumsum(0) - self.lengths[order]

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, T, D) of the texts `rows`, padded to the longest, and their padding mask (n, T)."""
        places = torch.arange(int(self.lengths[rows].max()))
        atts = places < self.lengths[rows, None]
        found = torch.where(atts, self.begin[rows, None] + places, 0).to(self.states.device)
        return self.states[found], atts.long().to(self.states.device)


class _Reranking:
    """Scores the candidates of one image after the other: its keys and values are projected once for all of them.

    similarity: (I, N). chosen: (I, N), the candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: _Texts,
        tokens: _ImageTokens,
        similarity: Tensor,
        chosen: Tensor,
        batch_size: int,
    ):
        self.model, self.texts, self.tokens, self.similarity = model, texts, tokens, similarity
        self.chosen, self.batch_size = chosen, batch_size
        self.differences: list[Tensor] = []
        self.spread: list[Tensor] = []

    def score(self, place: int, number: int, row: Tensor) -> None:
        """Fill in the row (N,) of the image `number`, whose tokens are at `place`."""
        candidates = self.chosen[number].nonzero().flatten()
        if self.similarity[number].isnan().all():  # it could not be read
            return
        candidates = candidates[self.texts.lengths[candidates].argsort(stable=True)]
        row[candidates] = self._scores(self.tokens[place], number, candidates)
        if place < len(self.tokens.exact):
            exact = self._scores(self.tokens.exact[place], number, candidates)
            self.differences.append((row[candidates] - exact).abs().max())
            self.spread.append(exact.std())

    def _scores(self, tokens: Tensor, number: int, candidates: Tensor) -> Tensor:
        """Scores (n,) of an image with tokens (L, V) and n texts."""
        device = self.texts.states.device
        image = self.model.project_image(tokens.to(device)[None])
        similar, scores = self.similarity[number].to(device), []
        for rows in candidates.split(self.batch_size):
            logits = self.model.match(*self.texts.padded(rows), image).float()
            scores.append(self.model.pair_scores(logits, similar[rows.to(device)]))
        return torch.cat(scores).float().cpu()

    def tell(self) -> None:
        """Log what half precision has changed."""
        if self.differences:
            worst, spread = float(torch.stack(self.differences).max()), float(torch.stack(self.spread).mean())
            told = "image tokens in float16: scores of %d images differ by at most %.1e (standard deviation %.1e)"
            log.info(told, len(self.differences), worst, spread)
