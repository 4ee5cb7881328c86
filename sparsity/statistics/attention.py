"""nn.MultiheadAttention, which reads the weights of its projections and calls no layer: inputs are taken there."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.errors import UserError
from sparsity.view import OUT


def projected(weight: str, module: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return what one of its weights, of `sparsity.view`, reads in a call with these arguments, (B, T, d) or (T, d).

    Raises UserError where queries and keys are made of different inputs, for which one matrix has no one statistic.
    """
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")
    given = dict(zip((*names, "is_causal"), args, strict=False)) | kwargs
    query, key, value = (given[name] for name in names[:3])
    if weight == OUT:
        return _attended(module, query, key, value, given)
    if not (_same(query, key) and _same(key, value)):
        raise UserError("nn.MultiheadAttention makes queries and keys of different inputs: keep it dense (--exclude)")
    return query if module.batch_first or query.ndim == 2 else query.transpose(0, 1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one, or, where a call is replayed, copies of one."""
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _attended(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, given: dict) -> Tensor:
    """The heads side by side: its output where the projection of the output is the identity."""
    turned = module.batch_first and query.ndim == 3
    query, key, value = (each.transpose(0, 1) if turned else each for each in (query, key, value))  # (T, B, d)
    assert module.in_proj_weight is not None, "else it is refused"
    identity = torch.eye(module.embed_dim, dtype=module.in_proj_weight.dtype, device=module.in_proj_weight.device)
    output, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.bias_k,
        module.bias_v,
        module.add_zero_attn,
        0.0,  # no dropout
        identity,
        None,
        training=False,
        need_weights=False,
        key_padding_mask=given.get("key_padding_mask"),
        attn_mask=given.get("attn_mask"),
        is_causal=given.get("is_causal", False),
    )
    return output.transpose(0, 1) if output.ndim == 3 else output
