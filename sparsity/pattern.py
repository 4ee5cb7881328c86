"""What a legal mask is: unstructured, or N:M. Needs torch's tensors, not torch itself, so that arguments are parsed
without it.

N:M means that exactly N are kept in every M consecutive weights along the input dimension: N is always what is kept.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from sparsity.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCOPES = ("layer", "row", "block")  # of a layer, what competes: "block" is 128 columns over all rows
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
            f"pattern must be N:M with N weights kept of every M, 1 <= N < M, such as 2:4, got {text!r:.60}"
        )
    return pattern
