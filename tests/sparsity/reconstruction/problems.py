"""Layers with correlated inputs, and formulas written out in float64, for the tests of reconstructions."""

import torch
from torch import Tensor

from sparsity.reconstruction.base import Problem
from sparsity.statistics.hessian import gram


def inputs(tokens: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return correlated features of different size and mean, (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width))
    rows += 0.3 * torch.randn(width, generator=generator, dtype=torch.float64)
    return (rows * torch.rand(width, generator=generator, dtype=torch.float64).add(0.1)).to(dtype)


def weights(outputs: int, width: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal weights, (outputs, width)."""
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hessian_of(rows: Tensor) -> Tensor:
    """Return the statistic "hessian", strips of (2 / n) X'X."""
    return 2 / len(rows) * gram(rows).double()


def problem_of(weight: Tensor, rows: Tensor, **options) -> Problem:
    """Return the problem of a layer with these inputs."""
    return Problem("layer", weight, {"hessian": hessian_of(rows)}, **options)


def damped(rows: Tensor, damp: float = 0.01) -> Tensor:
    """Return H = G + lambda I, (width, width), in float64."""
    G = rows.double().t() @ rows.double() / len(rows)
    live = G.diagonal() > 0
    ridge = damp * (G.diagonal()[live].mean() if live.any() else 0.5)
    return G + ridge * torch.eye(len(G), dtype=torch.float64)


def row_errors(weight: Tensor, updated: Tensor, H: Tensor) -> Tensor:
    """Return (w - b) H (w - b)' of each row, in float64."""
    lost = weight.double() - updated.double()
    return (lost @ H * lost).sum(dim=1)


def error(weight: Tensor, updated: Tensor, H: Tensor) -> float:
    """Return E = tr((W - B) H (W - B)'), in float64."""
    return float(row_errors(weight, updated, H).sum())


def direct(C: Tensor, H: Tensor, kept: Tensor) -> Tensor:
    """Return b_S = H_SS^-1 C_S row by row, in float64."""
    result = torch.zeros_like(C)
    for row, mask in enumerate(kept):
        result[row, mask] = torch.linalg.solve(H[mask][:, mask], C[row, mask])
    return result


def half_kept(shape: tuple[int, int], seed: int = 2, share: float = 0.5) -> Tensor:
    """Return a random mask whose rows keep different numbers of weights."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
