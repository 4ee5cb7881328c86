"""Refining a mask by exchanges of a kept weight for a pruned one within a row (idea: arXiv 2512.10922).

With d the part of a row that is lost and r = H d, its error is d'H d. Pruning p instead of q changes it by

    2 w_p r_p + w_p^2 H_pp - 2 w_q r_q + w_q^2 H_qq - 2 w_p w_q H_pq.

Each round makes the best exchange of each row, so that rows keep their counts, N:M patterns hold, and the error falls.
Not all pairs are looked at: since H is positive semidefinite, |w_p w_q H_pq| <= (|w_p| H_pp^0.5) (|w_q| H_qq^0.5), and
weights that cannot be part of the best pair by that bound are left out, which changes nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.pattern import NM

_GAIN = 1e-6  # of a row's error: what an exchange gains at least
_PAIRS = 1 << 22  # looked at together


def swap(
    weight: Tensor,
    H: Tensor,
    kept: Tensor,
    rounds: int,
    pattern: NM | None = None,
    alive: Tensor | None = None,
) -> Tensor:
    """Return the mask, (out, in) bool, after at most so many exchanges in each row.

    weight: (out, in). H: (in, in), symmetric, positive semidefinite. pattern: exchanges stay within its groups, of
    which the columns must be a multiple. alive: (out, in) bool, False where a weight was pruned before, and stays so
    (default: none was).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W, H, kept = weight.to(dtype), H.to(dtype), kept.clone()
    lost = W * ~kept
    r = lost @ H
    errors = (lost * r).sum(dim=1)
    rows = torch.arange(len(W), device=W.device)
    for _ in range(rounds):
        gone = None if alive is None else ~alive[rows]
        gains, pruned, restored = _best(W[rows], H, kept[rows], r[rows], pattern, gone)
        better = gains < -_GAIN * errors[rows]
        rows, gains, pruned, restored = (each[better] for each in (rows, gains, pruned, restored))
        if len(rows) == 0:
            break
        kept[rows, pruned], kept[rows, restored] = False, True
        errors[rows] += gains
        r[rows] += W[rows, pruned, None] * H[pruned] - W[rows, restored, None] * H[restored]
    return kept


def _best(
    w: Tensor, H: Tensor, kept: Tensor, r: Tensor, pattern: NM | None, gone: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row the change of its error by the best exchange (inf: there is none), the weight that is pruned
    and the one that comes back, (rows,) each. gone: (rows, in) bool, those that cannot come back.
    """
    alone = w.square() * H.diagonal()
    out = (alone + 2 * w * r).masked_fill_(~kept, torch.inf)  # pruned, alone
    back = (alone - 2 * w * r).masked_fill_(kept, torch.inf)  # restored, alone
    back = back if gone is None else back.masked_fill_(gone, torch.inf)
    parts = _within_groups(w, H, out, back, pattern) if pattern else _within_rows(w, H, out, back)
    gains, pruned, restored = out.new_empty(len(w)), kept.new_empty(len(w)).long(), kept.new_empty(len(w)).long()
    for rows, *found in parts:
        gains[rows], pruned[rows], restored[rows] = found
    return gains, pruned, restored


def _within_groups(
    w: Tensor, H: Tensor, out: Tensor, back: Tensor, pattern: NM
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield rows, and their best exchanges within groups of M columns."""
    m, width = pattern.m, w.shape[1]
    first = torch.arange(0, width, m, device=w.device)[:, None] + torch.arange(m, device=w.device)  # (groups, M)
    blocks = H[first[:, :, None], first[:, None, :]]  # (groups, M, M)
    for rows in torch.arange(len(w), device=w.device).split(max(1, _PAIRS // (width * m))):
        values, a, b = (each[rows].unflatten(1, (-1, m)) for each in (w, out, back))
        change = a[..., :, None] + b[..., None, :]  # (rows, groups, M, M)
        change.addcmul_(values[..., :, None] * blocks, values[..., None, :], value=-2)
        gains, index = change.flatten(1).min(dim=1)
        start = index.div(m * m, rounding_mode="floor") * m
        yield rows, gains, start + index % (m * m) // m, start + index % m


def _within_rows(w: Tensor, H: Tensor, out: Tensor, back: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield rows, and their best exchanges over all columns."""
    (first, firsts), (second, seconds) = _candidates(w, H, out, back)
    order, done = (firsts * seconds).argsort(descending=True), 0
    while done < len(order):
        most, more = int(firsts[order[done:]].amax()), int(seconds[order[done:]].amax())
        rows = order[done : done + max(1, _PAIRS // max(1, most * more))]
        done += len(rows)
        p, q = first[rows, :most], second[rows, :more]
        change = out[rows].gather(1, p)[:, :, None] + back[rows].gather(1, q)[:, None, :]
        pruned, restored = w[rows].gather(1, p)[:, :, None], w[rows].gather(1, q)[:, None, :]
        change.addcmul_(pruned * H[p[:, :, None], q[:, None, :]], restored, value=-2)
        gains, index = change.flatten(1).min(dim=1)
        p, q = p.gather(1, index[:, None] // more), q.gather(1, index[:, None] % more)
        yield rows, gains, p.squeeze(1), q.squeeze(1)


def _candidates(w: Tensor, H: Tensor, out: Tensor, back: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return for what is pruned and what is restored the columns, (rows, in), the most promising first, and how many of
    them, (rows,), at least one, can be part of a best pair.
    """
    size = w.abs() * H.diagonal().clamp(min=0).sqrt()
    # The best pair that has the best of one side: an upper bound of the best of all.
    p, q = out.argmin(dim=1, keepdim=True), back.argmin(dim=1, keepdim=True)
    with_p = back + out.gather(1, p) - 2 * w.gather(1, p) * w * H[p.squeeze(1)]
    with_q = out + back.gather(1, q) - 2 * w.gather(1, q) * w * H[q.squeeze(1)]
    found = torch.minimum(with_p.amin(dim=1, keepdim=True), with_q.amin(dim=1, keepdim=True))
    margin = 1e-5 * size.square().amax(dim=1, keepdim=True)  # of rounding
    largest = size.masked_fill(back.isinf(), 0).amax(dim=1, keepdim=True)
    first = out + back.amin(dim=1, keepdim=True) - 2 * size * largest
    largest = size.masked_fill(first > found + margin, 0).amax(dim=1, keepdim=True)
    second = back + out.amin(dim=1, keepdim=True) - 2 * size * largest
    return _leading(first, found + margin), _leading(second, found + margin)


def _leading(bounds: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    counts = (bounds <= limit).sum(dim=1).clamp(min=1)
    return bounds.topk(int(counts.amax()), dim=1, largest=False).indices, counts


def check_swaps(rounds: int) -> int:
    """Return the rounds of exchanges. UserError unless it is a whole number from 0."""
    if not isinstance(rounds, int) or rounds < 0:
        raise UserError(f"swaps must be a whole number from 0, got {rounds!r:.60}")
    return rounds
