"""The arithmetic of learnable N:M masks (MaskLLM, arXiv 2409.17481, equations 4 to 6), without a layer around it.

Shapes: a weight (out, in) is read as G = out * in / M groups of M consecutive weights; each group has C = C(M, N)
candidate masks and one logit for each of them in `gate`, (G, C). Of the noise, the softmax and the soft mask nothing is
kept: all are functions of (gate, key), computed again in the backward pass. They are computed for some thousand groups
at a time, which stay in the processor's cache, and candidate by candidate: gates lie in memory as (C, G), see
`new_gate`.
"""

import math
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.pattern import NM

_CACHED = 3 << 15  # logits that are computed together, for each thread of the processor
_LAUNCHED = 1 << 24  # and on an accelerator, where beginning costs more than memory does
# Multipliers and shifts of a 32-bit mixer by C. Wellons (hash-prospector, "lowbias32").
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
_MANTISSA = 23  # random bits of a uniform number in float32
_UNROLLED = 32  # up to so many candidates, it pays to go through them one by one


def candidates(pattern: NM) -> Tensor:
    """(C, M) float32: the masks with exactly N ones, in lexicographic order of the positions that are kept."""
    places = list(combinations(range(pattern.m), pattern.n))
    return torch.zeros(len(places), pattern.m).scatter_(1, torch.tensor(places), 1.0)


def new_gate(groups: int, pattern: NM, std: float, generator: torch.Generator | None = None) -> Tensor:
    """(G, C) float32 ~ N(0, std^2), whose memory is that of a contiguous (C, G): one candidate after the other."""
    return torch.randn(len(candidates(pattern)), groups, generator=generator).mul_(std).t()


def choose(gate: Tensor, pattern: NM) -> Tensor:
    """(G, C) -> bool (G, M): the candidate with the highest logit, the first of equal ones."""
    kept = candidates(pattern).to(gate.device).bool()
    planes = gate.detach().t()
    if len(planes) > _UNROLLED:
        return kept[planes.argmax(dim=0)]
    highest, best = planes[0], torch.zeros(planes.shape[1], dtype=torch.int32, device=gate.device)
    for number in range(1, len(planes)):  # argmax along a dimension of a handful is many times slower
        higher = planes[number] > highest
        highest = torch.where(higher, planes[number], highest)
        best.masked_fill_(higher, number)
    return kept[best]


def gumbel(shape: tuple[int, int], key: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
    """Columns `first` to `stop` of Gumbel(0, 1) noise of the shape (C, G), float32: a function of the key, two int32,
    and the place alone, whatever is computed together.
    """
    count, groups = shape
    place = torch.arange(first, groups if stop is None else stop, dtype=torch.int32, device=key.device)
    bits = place + torch.arange(count, dtype=torch.int32, device=key.device)[:, None] * groups
    bits ^= key[0]
    bits ^= _shifted(bits, 16)
    bits *= _MULTIPLIERS[0]
    bits ^= key[1]
    bits ^= _shifted(bits, 15)
    bits *= _MULTIPLIERS[1]
    # The upper bits, as a whole number around 0, and half a step more: strictly between 0 and 1.
    uniform = (bits >> (32 - _MANTISSA)).float().add_(2.0 ** (_MANTISSA - 1) + 0.5).mul_(2.0**-_MANTISSA)
    return uniform.log_().neg_().log_().neg_()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right of int32."""
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)


class Sampled:
    """The mask of a weight that `key` draws from `gate`; setting: (2,), scaling and tau.

    hard: the candidate that the sample prefers, instead of the mixture; its gradient is the mixture's.
    """

    def __init__(self, weight: Tensor, gate: Tensor, key: Tensor, setting: Tensor, pattern: NM, hard: bool):
        self.weight, self.key, self.hard = weight, key, hard
        self.rows, self.planes = weight.reshape(-1, pattern.m), gate.t()  # (G, M), (C, G)
        unrolled = torch.compiler.is_compiling() and gate.shape[1] <= _UNROLLED
        self.choice = _Sums(pattern) if unrolled else _Products(gate, pattern)
        self.scaling, self.tau = setting.to(gate.dtype).unbind()
        # Shares far below the rounding of what they are added to are 0: denormal numbers are slow, above all in the
        # matrix products that follow.
        self.least = 2 * math.log(torch.finfo(gate.dtype).eps)

    def masked(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The masked weight (out, in) as `dtype`, and the sum of its squares."""
        parts = self._parts()
        if len(parts) == 1:
            masked, norm = self._forward(parts[0])
            return masked.to(dtype).view_as(self.weight), norm
        masked, norm = torch.empty_like(self.rows, dtype=dtype), self.planes.new_zeros(())
        for part in parts:
            masked[part], own = self._forward(part)
            norm += own
        return masked.view_as(self.weight), norm

    def backward(
        self, of_masked: Tensor, of_norm: Tensor | None, train_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The masked weight again, as the dtype of its gradient `of_masked` (out, in), and the gradients of the gate
        and, where it is trained, of the weight. of_norm: gradient of the sum of squares, for which the weight counts as
        a constant. `of_masked` is overwritten.
        """
        upstream, parts = of_masked.reshape(self.rows.shape), self._parts()
        if len(parts) == 1:
            masked, of_gate, of_weight = self._backward(parts[0], upstream, of_norm)
        else:
            masked, of_gate = upstream, torch.empty_like(self.planes)  # a part of it is not read again
            of_weight = torch.empty_like(self.rows) if train_weight else None
            for part in parts:
                masked[part], of_gate[:, part], own = self._backward(part, upstream, of_norm)
                if of_weight is not None:
                    of_weight[part] = own
        shape = self.weight.shape
        of_weight = of_weight.view(shape) if train_weight and of_weight is not None else None
        return masked.to(of_masked.dtype).view(shape), of_gate.t(), of_weight

    def _parts(self) -> list[slice]:
        """The groups, some thousand at a time; a compiler gets them all, and fuses instead."""
        count, groups = self.planes.shape
        if torch.compiler.is_compiling():
            return [slice(0, groups)]
        size = max(1, (_CACHED * torch.get_num_threads() if self.planes.is_cpu else _LAUNCHED) // count)
        return [slice(first, min(first + size, groups)) for first in range(0, groups, size)]

    def _forward(self, part: slice) -> tuple[Tensor, Tensor]:
        product = self.rows[part] * self._mask(self._soft(part))
        return product, product.square().sum()

    def _backward(self, part: slice, upstream: Tensor, of_norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        soft, own, above = self._soft(part), self.rows[part], upstream[part].to(self.planes.dtype)
        mask = self._mask(soft)
        product, of_weight = own * mask, above * mask
        if of_norm is not None:
            above = above + product * (2 * of_norm)
        of_soft = self.choice.unmix(above * own)
        of_soft = of_soft - self.choice.total(of_soft * soft)
        return product, of_soft * soft * (self.scaling / self.tau), of_weight

    def _soft(self, part: slice) -> Tensor:
        """The soft choice (C, n), each column of which sums to 1."""
        count, groups = self.planes.shape
        noise = gumbel((count, groups), self.key, part.start, part.stop).to(self.planes.dtype)
        logits = noise.div_(self.tau).addcmul_(self.planes[:, part], self.scaling / self.tau)
        return self.choice.softmax(logits, self.least)

    def _mask(self, soft: Tensor) -> Tensor:
        """(n, M)"""
        if self.hard:
            soft = F.one_hot(soft.argmax(dim=0), len(soft)).to(soft).t()
        return self.choice.mix(soft)


class _Products:
    """Candidates as a matrix."""

    def __init__(self, gate: Tensor, pattern: NM):
        self.kept = candidates(pattern).to(gate)

    def softmax(self, logits: Tensor, least: float) -> Tensor:
        """(C, n), over C; 0 where a logit is so much below the highest."""
        below = torch.threshold_(logits.sub_(logits.amax(dim=0)), least, -math.inf)
        return below.softmax(dim=0)

    def total(self, shares: Tensor) -> Tensor:
        """(C, n) -> (n,)"""
        return shares.sum(dim=0)

    def mix(self, soft: Tensor) -> Tensor:
        """Shares of the candidates (C, n) -> mask (n, M)."""
        return soft.t() @ self.kept

    def unmix(self, of_mask: Tensor) -> Tensor:
        """Gradient of the mask (n, M) -> of the shares (C, n)."""
        return self.kept @ of_mask.t()


class _Sums:
    """The same row by row, which a compiler fuses with what is around it."""

    def __init__(self, pattern: NM):
        self.places = list(combinations(range(pattern.m), pattern.n))
        self.m = pattern.m

    def softmax(self, logits: Tensor, least: float) -> Tensor:
        rows = logits.unbind()
        highest = reduce(torch.maximum, rows)
        shares = [torch.where(row - highest > least, (row - highest).exp(), 0.0) for row in rows]
        total = reduce(torch.add, shares)
        return torch.stack([share / total for share in shares])

    def total(self, shares: Tensor) -> Tensor:
        return reduce(torch.add, shares.unbind())

    def mix(self, soft: Tensor) -> Tensor:
        shares = soft.unbind()
        kept = [[s for s, own in zip(shares, self.places, strict=True) if place in own] for place in range(self.m)]
        return torch.stack([reduce(torch.add, own) for own in kept], dim=-1)

    def unmix(self, of_mask: Tensor) -> Tensor:
        parts = of_mask.unbind(dim=-1)
        return torch.stack([reduce(torch.add, [parts[i] for i in own]) for own in self.places])
