"""How far apart the same sums may be: on another processor, with other threads or batches, they have another order."""

import torch
from torch import Tensor


def rounding(terms: Tensor, dim: int | tuple[int, ...] = 0, dtype: torch.dtype = torch.float32) -> float:
    """The most by which two sums of the terms along `dim`, added in `dtype` in any two orders, can differ.

    Each is at most (n - 1) eps / 2 of the sum of magnitudes away from the true sum, with a rounding of each term
    before it (a product) n eps / 2.
    """
    dims = (dim,) if isinstance(dim, int) else dim
    count = 1
    for i in dims:
        count *= terms.shape[i]
    return count * torch.finfo(dtype).eps * float(terms.double().abs().sum(dims).max())


def assert_same_sums(found: Tensor, expected: Tensor, terms: Tensor, dim: int | tuple[int, ...] = 0) -> None:
    """Both are sums of the terms along `dim`, in float32, in orders of their own."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(terms, dim))
