"""Outputs of a model that is not the project's own for a batch, as they are compared with those of its dense copy."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.view import Output, Outputs

NO_OUTPUT = "the model returns no floating-point tensor for a calibration batch: there is nothing to recover"
MASKS = ("decoder_attention_mask", "attention_mask")  # of the tokens that an output may have a row for
_LOGITS, _EMBEDDING = ("logits",), "_embeds"
# Not outputs: a loss needs labels; logits between the samples of a batch depend on which these are.
_LEFT_OUT = ("loss", "logits_per_image", "logits_per_text")


def outputs_of(result: Any, batch: Any, *, classifies: bool = False) -> Outputs:
    """Return the outputs in what a model's forward returns: a tensor, a mapping of names to them, or a tuple of them.

    A field "logits" has logits, the classes last, or second in maps (B, classes, H, W); "..._embeds" (B, width) are
    embeddings; all others are states, and only read where there are none of these. Tokens that a mask of the
    batch calls padding do not count. classifies: a bare tensor has logits. UserError where there is nothing.
    """
    if isinstance(result, Tensor):
        result = {"logits" if classifies else "output": result}
    named = dict(result.items()) if isinstance(result, Mapping) else dict(enumerate(_listed(result)))
    tensors = {str(name): value for name, value in named.items() if _counts(str(name), value)}
    if not tensors:
        raise UserError(NO_OUTPUT)
    told = {name: tensor for name, tensor in tensors.items() if name in _LOGITS or name.endswith(_EMBEDDING)}
    return {name: _output(name, tensor, batch) for name, tensor in (told or tensors).items()}


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else []


def _counts(name: str, value: Any) -> bool:
    floats = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return floats and name not in _LEFT_OUT


def _output(name: str, tensor: Tensor, batch: Any) -> Output:
    if name in _LOGITS:
        classes_last = tensor.movedim(1, -1) if tensor.ndim == 4 else tensor
        return Output("logits", classes_last, _real(classes_last, batch))
    kind = "embedding" if name.endswith(_EMBEDDING) and tensor.ndim == 2 else "states"
    return Output(kind, tensor, _real(tensor, batch))


def _real(tensor: Tensor, batch: Any) -> Tensor | None:
    """Which rows (B, T) of an output (B, T, width) are of real tokens, by the first mask of the batch that fits."""
    masks = [batch[name] for name in MASKS if name in batch] if isinstance(batch, Mapping) else []
    return next((mask != 0 for mask in masks if torch.is_tensor(mask) and mask.shape == tensor.shape[:-1]), None)
