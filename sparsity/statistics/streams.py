"""Measures of more than a layer's input alone: of the samples that are held out, and of the same tokens in the dense
model, whose stream runs beside the pruned one.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.errors import UserError
from sparsity.statistics.hessian import gram

_PARTS = 10  # one in so many samples is held out


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a layer's input in one call.

    rows: (tokens, in). held_out: (tokens,), bool, those of samples that are held out; None where nobody asks. dense:
    (tokens, in), the same tokens in the dense model; None where it is not run.
    """

    rows: Tensor
    held_out: Tensor | None = None
    dense: Tensor | None = None

    def of_held_out(self) -> Tensor:
        """Return the rows of samples that are held out."""
        assert self.held_out is not None, "samples are held out where a measure of them is asked for"
        return self.rows[self.held_out]

    def of_dense(self) -> Tensor:
        """Return the same rows in the dense model."""
        assert self.dense is not None, "the dense model is run where a measure of it is asked for"
        return self.dense


def products(tokens: Tokens) -> Tensor:
    """Return X'Xh, (in, in), in at least float32: X the inputs in the dense model, Xh those that are there."""
    dense, rows = tokens.of_dense(), tokens.rows
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return dense.to(dtype).t() @ rows.to(dtype)


def counted(tokens: Tokens) -> Tensor:
    """Return the number of tokens that are held out, (1,)."""
    assert tokens.held_out is not None, "samples are held out where a measure of them is asked for"
    return tokens.held_out.sum(dim=0, keepdim=True).to(torch.float32)


def of_streams(input_sums: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tokens], Tensor]]:
    """Return the measures by name, each of which adds up over batches. input_sums: (tokens, in) -> (in,)."""
    return {
        "products": products,
        "dense_gram": lambda tokens: gram(tokens.of_dense()),
        "dense_sums": lambda tokens: input_sums(tokens.of_dense()),
        "held_out_gram": lambda tokens: gram(tokens.of_held_out()),
        "held_out_sums": lambda tokens: input_sums(tokens.of_held_out()),
        "held_out_tokens": counted,
    }


def held_out(shape: torch.Size, number: int, device: torch.device) -> Tensor:
    """Return which tokens of an input (..., in) belong to samples that are held out, bool, of the shape without the
    last extent.

    A tenth of the samples is, over ten batches, one piece of the first extent in each; in the first batch it is the
    end, which has a sample at least. number: of the batch.
    """
    result = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    if result.ndim:
        part = _PARTS - 1 - number % _PARTS
        result[len(result) * part // _PARTS : len(result) * (part + 1) // _PARTS] = True
    return result


class DenseInputs:
    """The inputs of layers in the dense model for one batch, until the pruned model's come: the same calls in the same
    order.
    """

    def __init__(self) -> None:
        self._rows: dict[str, deque[Tensor]] = {}

    def add(self, key: str, rows: Tensor) -> None:
        """Keep the rows (tokens, in) of a call of the layer whose weight has this key."""
        self._rows.setdefault(key, deque()).append(rows)

    def take(self, key: str) -> Tensor:
        """Return the rows of the first call that is left. UserError where there is none."""
        waiting = self._rows.get(key)
        if not waiting:
            raise other_tokens(key)
        return waiting.popleft()

    def finish(self) -> None:
        """Raise UserError where rows are left."""
        for key, waiting in self._rows.items():
            if waiting:
                raise other_tokens(key)
        self._rows.clear()


def other_tokens(key: str) -> UserError:
    return UserError(
        f"layer {key!r} gets other tokens in the pruned model than in the dense one, so that they cannot be compared:"
        " leave --target dense and --block_steps out"
    )
