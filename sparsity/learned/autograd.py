"""Products with a sampled mask that keep for the backward pass what is there anyway (MaskLLM, arXiv 2409.17481)."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sparsity.learned.gates import Sampled
from sparsity.pattern import NM


class MaskedProduct(Function):
    """x (..., in) -> x @ (W * sample)^T + b (..., out), and ||W * sample||^2.

    Kept for the backward pass: x, where it cannot be had again (`Again`), and what is there anyway (W, gate, key). The
    sample is drawn again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gate, key, setting, n, m, hard, again):
        masked, norm = Sampled(weight, gate, key, setting, NM(n, m), hard).masked(x.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if again is None else None, weight, gate, key, setting)
        ctx.options, ctx.again, ctx.shape = (NM(n, m), hard), again, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, masked, None if bias is None else bias.to(x.dtype)), norm

    @staticmethod
    def backward(ctx, of_y, of_norm):
        x, weight, gate, key, setting = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream = of_y.reshape(-1, of_y.shape[-1])
        of_masked = upstream.t() @ x.reshape(-1, x.shape[-1]) if ctx.again is None else ctx.again.product(upstream)
        masked, of_gate, of_weight = Sampled(weight, gate, key, setting, *ctx.options).backward(
            of_masked, of_norm, wants_weight
        )
        of_x = (upstream @ masked).view(ctx.shape) if wants_x else None
        of_bias = upstream.sum(dim=0).to(ctx.bias_dtype) if wants_bias else None
        return of_x, of_weight, of_bias, of_gate, None, None, None, None, None, None


class MaskedWeight(Function):
    """W * sample (out, in), and ||W * sample||^2, where the product is not taken here. Nothing is kept either."""

    @staticmethod
    def forward(ctx, weight, gate, key, setting, n, m, hard):
        ctx.save_for_backward(weight, gate, key, setting)
        ctx.options = NM(n, m), hard
        return Sampled(weight, gate, key, setting, *ctx.options).masked(weight.dtype)

    @staticmethod
    def backward(ctx, of_masked, of_norm):
        sampled = Sampled(*ctx.saved_tensors, *ctx.options)
        _, of_gate, of_weight = sampled.backward(of_masked.clone(), of_norm, ctx.needs_input_grad[0])
        return of_weight, of_gate, None, None, None, None, None


def _normalised(node: Any, rows: slice) -> Tensor:
    """Return the output of layer norm over the last dimension."""
    x, mean, scale = (
        tensor.reshape(-1, tensor.shape[-1])[rows]
        for tensor in (node._saved_input, node._saved_result1, node._saved_result2)
    )
    x = (x - mean).mul_(scale)
    x = x if node._saved_weight is None else x.mul_(node._saved_weight)
    return x if node._saved_bias is None else x.add_(node._saved_bias)


def _gelu(node: Any, rows: slice) -> Tensor:
    x = node._saved_self
    return F.gelu(x.reshape(-1, x.shape[-1])[rows], approximate=node._saved_approximate)


def _silu(node: Any, rows: slice) -> Tensor:
    return F.silu(node._saved_self.reshape(-1, node._saved_self.shape[-1])[rows])


class Again:
    """The input of a layer, computed again from what the backward pass of its maker keeps in any case.

    With frozen weights a dense layer does not keep its input, and most inputs are those of norms and activations: so a
    mask need not cost that memory either.
    """

    MAKERS: ClassVar = {"NativeLayerNormBackward0": _normalised, "GeluBackward0": _gelu, "SiluBackward0": _silu}
    ROWS = 512  # computed at a time

    def __init__(self, node: Any, dtype: torch.dtype):
        self.node, self.dtype = node, dtype

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> "Again | None":
        """None where it is to be kept: it has another maker; a compiler decides for itself; and where hooks pack what
        the maker keeps, as checkpointing does, it may be unpacked once only.
        """
        if torch.compiler.is_compiling() or x.grad_fn is None or x.grad_fn.name() not in cls.MAKERS:
            return None
        node: Any = x.grad_fn  # what it has saved is in no stub
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        flat = node.name() != "NativeLayerNormBackward0" or len(node._saved_normalized_shape) == 1
        return cls(node, dtype) if hooks is None and flat else None

    def product(self, upstream: Tensor) -> Tensor:
        """upstream (rows, out) -> upstream^T @ x (out, in)."""
        make = self.MAKERS[self.node.name()]
        if upstream.dtype in (torch.float16, torch.bfloat16):  # whose sums must not be rounded in between
            return upstream.t() @ make(self.node, slice(None)).to(self.dtype)
        first, *rest = (slice(start, start + self.ROWS) for start in range(0, max(1, len(upstream)), self.ROWS))
        total = upstream[first].t() @ make(self.node, first).to(self.dtype)
        for rows in rest:
            total.addmm_(upstream[rows].t(), make(self.node, rows).to(self.dtype))
        return total
