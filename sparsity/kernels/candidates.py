"""The ways in which a linear layer can be computed, and why one of them is out of the question."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsity.kernels.linear import SparseLinear
from sparsity.kernels.semi_structured import SemiStructuredLinear, why_not
from sparsity.pattern import Block

BLOCKS = (Block(4, 4), Block(16, 16))
DENSE, CSR, SEMI = "dense", "CSR", "2:4"
_MOST = {CSR: 0.4, "block": 0.5}  # of what would be stored, at most this share: above it a trial is a waste of time
Build = Callable[[], nn.Module]


def candidates(weight: Tensor, bias: Tensor | None, tokens: int) -> tuple[dict[str, Build], list[str]]:
    """Return the name of each way to compute a layer besides the dense one -> what builds it, and one line for each way
    that is not tried.

    weight: (out, in), on its device. tokens: rows of the layer's real input.
    """
    found: dict[str, Build] = {}
    reasons: list[str] = []
    if weight.is_cuda:
        if reason := why_not(weight):
            return {}, [reason]
        return {SEMI: lambda: SemiStructuredLinear(weight, bias, tokens)}, []
    if not weight.is_cpu or weight.dtype != torch.float32:
        return {}, [f"no sparse kernel for {weight.dtype} on {weight.device.type}".replace("torch.", "")]
    kept = float(weight.count_nonzero()) / weight.numel()
    if kept <= _MOST[CSR]:
        found[CSR] = lambda: SparseLinear(weight, bias)
    else:
        reasons.append(f"{CSR}: {kept:.0%} of the weights are kept")
    for block in BLOCKS:
        if not block.fits(weight.shape):
            reasons.append(f"{block}: does not divide it")
            continue
        used = float(block.reduce((weight != 0).float()).count_nonzero()) * block.numel / weight.numel()
        if used <= _MOST["block"]:
            found[str(block)] = lambda block=block: SparseLinear(weight, bias, block)
        else:
            reasons.append(f"{block}: {used:.0%} of the blocks are used")
    return found, reasons
