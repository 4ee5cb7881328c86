"""Keeping the mean output of a layer (`--correct_bias`): its bias takes what the updated weights change in the mean.

With m the mean row of the inputs, the bias is free to take W m - B m, and what the weights have to match is the rest of
the output: G becomes that of the centred inputs, G - m m'. With the dense model's output as the target, Gh - mh mh' and
X'Xh / n - m mh', where m and mh are the means of the dense and of the pruned model's inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsity.statistics.hessian import strips

_CONSTANT = 1e-6  # of an input's mean square: variance below that is rounding


def centred(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the statistics of a layer's centred inputs.

    Of "input_means", (in,), the mean row of the inputs that the layer gets, "hessian", and where they are there
    "dense_means", "cross" and "dense_hessian" of the dense target. "training" and "held_out", with "training_means" and
    "held_out_means", lose the mean of the training samples: the bias is known from these alone. All others are returned
    as they are.
    """
    found = dict(statistics)
    mean = statistics["input_means"]
    dense_mean = statistics.get("dense_means", mean)
    found["hessian"] = centred_strips(statistics["hessian"], mean)
    if "dense_hessian" in statistics:
        found["dense_hessian"] = centred_strips(statistics["dense_hessian"], dense_mean)
    if "cross" in statistics:
        cross = statistics["cross"]
        found["cross"] = cross - torch.outer(dense_mean.to(cross), mean.to(cross))
    if "training" in statistics:
        known, held_out = statistics["training_means"], statistics["held_out_means"]
        found["training"] = centred_strips(statistics["training"], known)
        found["held_out"] = centred_strips(statistics["held_out"], held_out)
        add_square(found["held_out"], held_out - known)
    return found


def centred_strips(packed: Tensor, mean: Tensor) -> Tensor:
    """Return strips of 2 (G - m m') from those of 2 G. mean: m, (in,).

    An input that is constant but for rounding is 0 afterwards, so that it counts as one that was always zero.
    """
    result, width = packed.clone(), len(mean)
    mean = mean.to(packed)
    pieces = [(strip, result[where].view(-1, width - strip.start)) for strip, where in strips(width)]
    squares = torch.cat([piece.diagonal() for _, piece in pieces])
    varies = (squares - 2 * mean.square() > _CONSTANT * squares).to(packed.dtype)
    for strip, piece in pieces:
        piece.sub_(torch.outer(mean[strip], mean[strip.start :]), alpha=2)
        piece.mul_(varies[strip, None]).mul_(varies[strip.start :])
    return result


def add_square(packed: Tensor, row: Tensor) -> None:
    """Add 2 d d' to strips of 2 G, in place. row: d, (in,)."""
    row = row.to(packed)
    for strip, where in strips(len(row)):
        packed[where].view(-1, len(row) - strip.start).add_(torch.outer(row[strip], row[strip.start :]), alpha=2)


def bias_change(weight: Tensor, updated: Tensor, mean: Tensor, dense_mean: Tensor | None = None) -> Tensor:
    """Return what is added to a layer's bias so that its mean output is the dense layer's, (out,), in float64 where the
    means are.

    weight, updated: W and B, (out, in). mean: of the inputs that the layer gets, (in,). dense_mean: of the inputs that
    it got in the dense model, where they differ.
    """
    before = mean if dense_mean is None else dense_mean
    return weight.to(mean.dtype) @ before - updated.to(mean.dtype) @ mean
