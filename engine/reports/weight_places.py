"""Where in a model its weights lie, and how large they are: what the plots of a pruning run show."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsity.view import PrunableView

EXPONENTS = (-8.0, 2.0)  # of the magnitudes that are told apart, powers of ten
BINS = 250
_SAMPLE = 1 << 16  # weights of a layer that are looked at


def place(name: str) -> tuple[str, str]:
    """Block and kind of a weight from its state-dict key: the block ends with the first number in the name.

    "encoder.layer.3.attention.self.query.weight" is "attention.self.query" of "encoder.layer.3"; without a number the
    block is "".
    """
    stem = name.removesuffix(".weight")
    found = re.match(r"(.*?(?:^|\.)\d+)\.(.+)", stem)
    return found.groups() if found else ("", stem)


def magnitudes(view: PrunableView, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Group -> how many of its weights have a magnitude in each of `BINS` bins, evenly spaced over the logarithm.

    Zeros are left out, and so is what `masks` prunes. Of large layers every so many-th weight is looked at and counts
    for as many. What lies beyond `EXPONENTS` counts in the outermost bins.
    """
    counts = {group: torch.zeros(BINS, dtype=torch.float64) for group in view.groups}
    for name, weight in view.weights.items():
        step = max(1, weight.numel // _SAMPLE) | 1  # odd: it meets all places of an N:M group
        values = weight.parameter.detach().flatten()[::step]
        share = weight.numel / len(values)
        if masks is not None:
            values = values[masks[name].flatten()[::step].to(values.device)]
        logarithms = values[values != 0].abs().float().log10().clamp(*EXPONENTS).cpu()
        counts[weight.group] += share * torch.histc(logarithms, BINS, *EXPONENTS).double()
    return counts
