"""Patterns that a mask may have: unstructured, N:M, or blocks. Needs torch's tensors, not torch itself, so that
arguments are parsed without it.

N:M means that exactly N are kept in every M consecutive weights along the input dimension: N is always what is kept.
Blocks of R x C weights are pruned or kept as one; how many of them, a sparsity says.
"""

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from sparsity.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCOPES = ("layer", "row", "block")  # of a layer, what competes: "block" is 128 columns over all rows
_LARGEST = {4: (2 - 2.0**-23) * 2.0**127, 8: sys.float_info.max}  # bytes of a float -> its largest value
GROUPS = (4, 8, 16, 32)  # sizes of groups that are looked for in zeros
_SORTED = 16  # groups of more weights are sorted, smaller ones compared pair by pair


@dataclass(frozen=True)
class NM:
    """N weights kept of every M."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> Fraction:
        return Fraction(self.m - self.n, self.m)

    def fits(self, inputs: int) -> bool:
        """Whether a layer with so many inputs divides into groups of M; one that does not stays dense."""
        return inputs % self.m == 0

    def keep(self, scores: "Tensor") -> "Tensor":
        """The N highest scores of each M along the last dimension, (..., in) -> bool (..., in). Of equal scores the
        lowest index is pruned first.
        """
        if not self.fits(scores.shape[-1]):
            raise UserError(f"a layer with {scores.shape[-1]} inputs does not divide into groups of {self.m}")
        groups = scores.unflatten(-1, (-1, self.m))  # (..., in / M, M)
        return self.keep_leading(groups.movedim(-1, 0).contiguous()).movedim(0, -1).flatten(-2).contiguous()

    def keep_leading(self, scores: "Tensor") -> "Tensor":
        """The same for groups along the first dimension, (M, ...) -> bool (M, ...)."""
        if self.m > _SORTED:
            order = scores.argsort(dim=0, stable=True)
            return scores.bool().fill_(True).scatter_(0, order[: self.m - self.n], False)
        above = scores.byte().zero_()  # how many of its group are pruned before it
        for i in range(self.m):
            for j in range(i + 1, self.m):  # in groups as small as these, several times as fast as sorting
                higher = scores[i] > scores[j]
                above[i] += higher
                above[j] += ~higher
        return above >= self.m - self.n


@dataclass(frozen=True)
class Block:
    """Blocks of rows x columns of a weight (out, in), each of which is pruned or kept as one."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"block{self.rows}x{self.columns}"

    @property
    def numel(self) -> int:
        """Return how many weights a block has."""
        return self.rows * self.columns

    def fits(self, shape: "Sequence[int]") -> bool:
        """Return whether a weight (out, in) divides into blocks; one that does not stays dense."""
        return shape[0] % self.rows == 0 and shape[1] % self.columns == 0

    def reduce(self, scores: "Tensor") -> "Tensor":
        """Return the score of each block, (out / rows, in / columns): the sum over its weights, of scores (out, in), in
        float32 or wider. Scores at the lower end of their range (`sparsity.selection.lowered`) keep their block there.
        """
        if not self.fits(scores.shape):
            raise UserError(f"a weight of {tuple(scores.shape)} does not divide into blocks of {self}")
        wide = scores if scores.element_size() >= 4 else scores.float()
        blocks = wide.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))  # (out / R, R, in / C, C)
        return blocks.sum(dim=(1, 3)).clamp_(min=-_LARGEST[wide.element_size()])

    def expand(self, kept: "Tensor") -> "Tensor":
        """Return a mask of weights, bool (out, in), from one of blocks (out / rows, in / columns)."""
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


def patterns_of(matrices: "Sequence[Tensor]") -> list[NM]:
    """N:M that the zeros of all these matrices (..., in) hold, for each M of `GROUPS`, with the least N, if it is below
    M.
    """
    found = []
    for m in GROUPS:
        if all(matrix.shape[-1] % m == 0 and matrix.numel() for matrix in matrices):
            n = max(int(matrix.unflatten(-1, (-1, m)).count_nonzero(-1).max()) for matrix in matrices)
            found += [NM(max(n, 1), m)] if n < m else []
    return found


def parse_pattern(text: str | None) -> NM | None:
    """NM(2, 4) for "2:4"; None for None or "unstructured". UserError unless 1 <= N < M."""
    if text is None or text == "unstructured":
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text, re.ASCII)
    pattern = NM(int(match[1]), int(match[2])) if match else None
    if pattern is None or not 1 <= pattern.n < pattern.m:
        raise UserError(
            f"pattern must be N:M with N weights kept of every M, 1 <= N < M, such as 2:4, or blockRxC, got"
            f" {text!r:.60}"
        )
    return pattern


def pattern_of(text: str | None) -> NM | Block | None:
    """NM(2, 4) for "2:4", Block(4, 4) for "block4x4"; None for None or "unstructured". UserError for anything else."""
    if text is None or not text.strip().startswith("block"):
        return parse_pattern(text)
    match = re.fullmatch(r"\s*block(\d{1,6})x(\d{1,6})\s*", text, re.ASCII)
    block = Block(int(match[1]), int(match[2])) if match else None
    if block is None or not block.numel > 1:
        raise UserError(f"a pattern of blocks is blockRxC, R rows and C columns, such as block4x4, got {text!r:.60}")
    return block
