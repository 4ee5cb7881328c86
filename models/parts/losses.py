"""Losses that vision-language models share: contrastive, matching with hard negatives, box regression."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from models.parts.similarity import similarity, without_autocast


def gather_features(features: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, with gradients to each: (B, ...) -> (sum of B, ...).

    B may differ by rank. Where another size does, as the length of texts, the shorter tensors are padded with zeros.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return features
    own = torch.tensor(features.shape, device=features.device)
    shapes = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(shapes, own)
    missing = (torch.stack(shapes).amax(0) - own).tolist()
    padded = F.pad(features, [side for more in reversed(missing) for side in (0, more)])
    return torch.cat([rows[: int(shape[0])] for rows, shape in zip(_AllGather.apply(padded), shapes, strict=True)])


def own_rows(count: int, device: torch.device | None = None) -> Tensor:
    """Return the place of the `count` rows of this rank among those of `gather_features`."""
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    return (gather_features(torch.full((count,), rank, device=device)) == rank).nonzero().flatten()


class _AllGather(torch.autograd.Function):
    """A tensor of each rank, in rank order; a rank's gradient is the sum of what all ranks have for its tensor."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> tuple[Tensor, ...]:
        every = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, tensor.contiguous())
        return tuple(every)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        distributed.all_reduce(total)
        return total[distributed.get_rank()]


def contrastive_loss(image_feat: Tensor, text_feat: Tensor, temp: Tensor, ids: Tensor | None = None) -> Tensor:
    """ITC: symmetric cross-entropy of the similarities (CLIP, ALBEF eq. 1).

    image_feat, text_feat: l2-normalised (B, E). temp: scalar. ids: (B,) sample ids; targets are spread over equal ids.
    """
    logits = similarity(image_feat, text_feat, temp)
    if ids is None:
        targets = torch.arange(len(logits), device=logits.device)
    else:
        same = (ids[:, None] == ids[None, :]).to(logits.dtype)
        targets = same / same.sum(1, keepdim=True)
    with without_autocast(logits.device):
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2


@torch.no_grad()
def hard_negatives(
    image_feat: Tensor,
    text_feat: Tensor,
    temp: Tensor,
    ids: Tensor | None = None,
    *,
    floor: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor] | None:
    """One negative image per text and one negative text per image, drawn by the similarity of their features.

    image_feat, text_feat: l2-normalised (B, E). temp: scalar. The rest as in `draw_negatives`.
    """
    logits = similarity(image_feat, text_feat, temp)
    return draw_negatives(logits.t(), logits, ids, floor=floor, generator=generator)


@torch.no_grad()
def draw_negatives(
    text_to_image: Tensor,
    image_to_text: Tensor,
    ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    *,
    floor: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor] | None:
    """One negative image per text and one negative text per image, drawn by similarity (ALBEF, arXiv 2107.07651, 3.2).

    text_to_image, image_to_text: (B, P) similarities over temperature, rows are what negatives are drawn for. ids: (B,)
    sample ids; equal ones are no negatives. pool_ids: (P,), of the samples that can be drawn, by default the same ones.
    floor is added to the softmax, so that every other sample can be drawn. Returns image indices (B,) and text indices
    (B,), or None where there is no negative: one sample only, or all ids equal.
    """
    ids = torch.arange(len(text_to_image), device=text_to_image.device) if ids is None else ids
    same = ids[:, None] == (ids if pool_ids is None else pool_ids)[None, :]
    if bool(same.all()):
        return None
    drawn = []
    for rows in (text_to_image.float(), image_to_text.float()):
        # Where the model has become NaN something is drawn, so that its loss says so, not a failing draw.
        weights = (rows.softmax(1).nan_to_num() + floor).masked_fill(same, 0.0)
        weights = weights + (weights.sum(1, keepdim=True) == 0) * ~same  # all but the pair has underflowed
        if generator is not None:
            weights = weights.to(generator.device)
        # One call per row: the order in which the public code consumes the random stream.
        drawn.append(torch.cat([torch.multinomial(row, 1, generator=generator) for row in weights]))
    return drawn[0].to(same.device), drawn[1].to(same.device)


def box_losses(predicted: Tensor, target: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU, averaged over the regions (rows with is_image = 0).

    predicted, target: (R, 4) as (cx, cy, w, h) in [0, 1]. is_image: (R,), 1 where the row is a whole image.
    """
    weight = 1.0 - is_image.to(predicted.dtype)
    count = weight.sum().clamp(min=1.0)
    l1 = (F.l1_loss(predicted, target, reduction="none").sum(1) * weight).sum() / count
    corners = box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "cxcywh", "xyxy")
    overlap = generalized_box_iou(*corners).diagonal()
    return l1, ((1.0 - overlap) * weight).sum() / count
