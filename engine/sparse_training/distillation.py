"""Distillation: how far a model's outputs are from those of the dense model that it was pruned from.

The one loss of `prune.py --recover`, and of fine-tuning against the dense model. Each term is a mean over samples, each
sample's the mean over its real positions: so the loss of a batch is the mean of those of its halves, on one device or
on two.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsity.view import Output, Outputs

TEMPERATURE = 2.0
SMALL = 1e-6  # squared length from which on states count as something


def distillation(student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """Return the "loss", the sum of one term for each output, and the terms, all scalars in float32 or wider.

    student, teacher: what a view's `outputs` gives for the same batch, of the pruned model and of the dense one, which
    gets no gradient. "logits": T^2 KL(softmax(t / T) || softmax(s / T)) at T = 2 (arXiv 1503.02531, section 2);
    "embedding": 1 - cosine(s, t); "states": |s - t|^2 / |t|^2, each over the real positions of a sample.
    """
    terms = {name: _term(own, teacher[name]) for name, own in student.items()}
    return {"loss": torch.stack([*terms.values()]).sum(), **terms}


def _term(student: Output, teacher: Output) -> Tensor:
    s, t = _wide(student.tensor), _wide(teacher.tensor).detach()
    with torch.autocast(s.device.type, enabled=False):
        return DISTANCES[student.kind](s, t, student.real)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _divergence(s: Tensor, t: Tensor, real: Tensor | None) -> Tensor:
    """T^2 times the Kullback-Leibler divergence, at the temperature T."""
    log_s, log_t = ((logits / TEMPERATURE).log_softmax(-1) for logits in (s, t))
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return TEMPERATURE**2 * _mean(divergence, real)


def _turned(s: Tensor, t: Tensor, real: Tensor | None) -> Tensor:
    return _mean(1 - F.cosine_similarity(s, t, dim=-1), real)


def _relative(s: Tensor, t: Tensor, real: Tensor | None) -> Tensor:
    error, size = (_sums(x.square().sum(-1), real) for x in (s - t, t))
    return (error / size.clamp_min(SMALL)).mean()


DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "logits": _divergence,
    "embedding": _turned,
    "states": _relative,
}


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean over samples of the mean over a sample's real positions: values (B, ...), real of their shape."""
    return (_sums(values, real) / _sums(torch.ones_like(values), real).clamp_min(1)).mean()


def _sums(values: Tensor, real: Tensor | None) -> Tensor:
    """Average over the real positions of each sample: (B, ...) -> (B,). What stands at padding may be NaN."""
    kept = values if real is None else torch.where(real, values, 0)
    return kept.flatten(1).sum(1) if kept.ndim > 1 else kept
