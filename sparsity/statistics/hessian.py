"""The layer-wise problem of arXiv 2301.00774, min ||W X - Q X||^2 for each layer, through H = (2/n) X X^T.

H is symmetric: only its upper triangle is computed and kept, as strips of rows one after the other in a vector, each
from its first diagonal entry on. One factorisation, H = R R^T with R upper triangular, is all that is needed: U = R^-1
is the upper Cholesky factor of H^-1, since H^-1 = U^T U.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import UserError

logger = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean of H's diagonal
_STRIPS, _NARROWEST = 8, 128
_PANEL = 256  # columns that are factorised together
_ATTEMPTS = 8


def strips(width: int) -> Iterator[tuple[slice, slice]]:
    """(rows of H, where they are in the vector, each from the strip's first row on)."""
    height, end = max(_NARROWEST, -(-width // _STRIPS)), 0
    for first in range(0, width, height):
        last = min(first + height, width)
        begin, end = end, end + (last - first) * (width - first)
        yield slice(first, last), slice(begin, end)


def gram(rows: Tensor) -> Tensor:
    """Inputs (tokens, in) -> strips of X X^T, in at least float32, whatever the arithmetic of the forward."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        width = rows.shape[1]
        result = rows.new_empty(list(strips(width))[-1][1].stop)
        for strip, where in strips(width):
            torch.mm(rows[:, strip].t(), rows[:, strip.start :], out=result[where].view(-1, width - strip.start))
    return result


def triangle(packed: Tensor, width: int) -> Tensor:
    """Strips -> (in, in), zero below the diagonal."""
    result = packed.new_zeros(width, width)
    for strip, where in strips(width):
        result[strip, strip.start :] = packed[where].view(-1, width - strip.start)
    return result.triu_()


@dataclass(frozen=True)
class Factor:
    """R of a layer's H + damping * (mean of H's diagonal over live columns) * I.

    turned: R with rows and columns in reverse order, lower triangular. live: (in,), bool, False where the input was
    always zero. name: of the layer.
    """

    turned: Tensor
    live: Tensor
    name: str

    def unit(self, columns: slice) -> Tensor:
        """S[: columns.stop, columns]: R with each row divided by its diagonal entry."""
        width = len(self.turned)
        part = self.turned[width - columns.stop :, width - columns.stop : width - columns.start]
        return part.flip(0, 1).div_(self.diagonal[: columns.stop, None])

    @property
    def diagonal(self) -> Tensor:
        """Return the diagonal of R, (in,): 1 / U_jj."""
        return self.turned.diagonal().flip(0)


def factor(
    hessian: Tensor, width: int, name: str, dtype: torch.dtype = torch.float32, damping: float = DAMPING
) -> Factor:
    """The factor of a layer's H, from its strips, in `dtype`.

    Where the factorisation fails, the damping grows tenfold, with a warning that names the layer. UserError where it
    fails all the same.
    """
    pieces = ((strip, hessian[where].view(-1, width - strip.start)) for strip, where in strips(width))
    diagonal = torch.cat([piece.diagonal() for _, piece in pieces])
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    for _ in range(_ATTEMPTS):
        lower = _turned(hessian, width, dtype)
        lower.diagonal().copy_((diagonal + damping * mean).flip(0))
        if _cholesky(lower):
            return Factor(lower, live, name)
        damping *= 10
        logger.warning("layer %r: its Hessian cannot be factorised: damping is raised to %g of its mean", name, damping)
    raise UserError(f"the Hessian of layer {name!r} cannot be factorised: its inputs are too large or too much alike")


def _turned(hessian: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The lower triangle (in, in) of H with rows and columns in reverse order."""
    result = hessian.new_zeros(width, width, dtype=dtype)
    for strip, where in strips(width):
        height = width - strip.start
        result[width - strip.stop : height, :height] = hessian[where].view(-1, height).to(dtype).flip(0, 1)
    return result


def _cholesky(lower: Tensor) -> bool:
    """Factorises a lower triangle in place, by panels, whose products run at the full rate of the device; whether it
    could.
    """
    width = len(lower)
    for first in range(0, width, _PANEL):
        here, rest = slice(first, min(first + _PANEL, width)), slice(min(first + _PANEL, width), width)
        lower[first:, here].addmm_(lower[first:, :first], lower[here, :first].t(), alpha=-1)
        block, failed = torch.linalg.cholesky_ex(lower[here, here])
        if failed or not block.diagonal().isfinite().all():
            return False
        lower[here, here] = block
        inverse = torch.linalg.solve_triangular(block, torch.eye(len(block)).to(block), upper=False)
        lower[rest, here] = lower[rest, here] @ inverse.t()
    lower.tril_()
    return True
