"""Reading and report of the evaluation of a sparse checkpoint."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.reports.report import Metrics
from sparsity.errors import UserError
from sparsity.learned.checkpoint import GATE, fold
from sparsity.pattern import patterns_of
from sparsity.view import PrunableView

log = logging.getLogger(__name__)


def loaded(state: dict[str, Tensor], mode: str, path: str) -> tuple[dict[str, Tensor], int]:
    """The weights of a checkpoint, and how many parameters are gates, whose masks are put into the weights.

    mode: "maskllm", where there must be masks; else there must be none. UserError otherwise.
    """
    masked = fold(state)
    learned = masked.keys() != state.keys()
    if learned and mode != "maskllm":
        raise UserError(f"{path}: has learned masks: give --sparsity-mode maskllm")
    if mode == "maskllm" and not learned:
        raise UserError(f"{path}: has no learned masks (*.gate or *.mask): give --sparsity-mode sparse or dense")
    return masked, sum(tensor.numel() for name, tensor in state.items() if name.endswith(GATE))


def tell_zeros(view: PrunableView, path: str) -> None:
    """Says how many prunable weights are zero, and what patterns hold; a warning where there is nothing of the kind."""
    zero = {n: w.numel - int(torch.count_nonzero(w.parameter)) for n, w in view.weights.items()}
    sparse = [name for name, gone in zero.items() if 10 * gone >= view.weights[name].numel]
    share = 100 * sum(zero.values()) / view.numel
    log.info("%.2f %% of %s prunable weights are zero", share, f"{view.numel:,}")
    if not sparse:
        log.warning("%s: has next to no zeros: these are the weights of a dense model", path)
        return
    matrices = [view.weights[name].matrix() for name in sparse]
    held = ", ".join(map(str, patterns_of(matrices)))
    log.info("%d of %d layers are sparse; pattern: %s", len(sparse), len(view.weights), held or "none")


def result(name: str, accuracy: Metrics, model: nn.Module, gates: int, images: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a model. gates: parameters that decide about masks. images: its data configuration."""
    parameters = sum(parameter.numel() for parameter in model.parameters()) + gates
    top = {
        key: value
        for k in (1, 5)
        for key, value in ((f"top{k}", accuracy[f"top{k}"]), (f"top{k}_err", 100 - accuracy[f"top{k}"]))
    }
    return {
        "model": name,
        **{key: round(value, 4) for key, value in top.items()},
        "param_count": round(parameters / 1e6, 2),
        "img_size": images["input_size"][-1],
        "crop_pct": images["crop_pct"],
        "interpolation": images["interpolation"],
    }
