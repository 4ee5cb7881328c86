"""One-shot N:M pruning around its pruner: what a run asks for, reports and writes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.export import as_published, save_weights
from engine.options.oneshot import Target
from engine.pruning.run import calibrate, check_finite
from engine.reports.report import Metrics, markdown_table
from sparsity.errors import UserError
from sparsity.files import replacing
from sparsity.masks import Masks
from sparsity.run.request import Request
from sparsity.view import PrunableView


def divisible(view: PrunableView, target: Target) -> None:
    """UserError where M divides the inputs of no layer, so that nothing would be pruned."""
    pattern = target.pattern
    if pattern and not any(pattern.fits(weight.shape[1]) for weight in view.weights.values()):
        widths = ", ".join(map(str, sorted({weight.shape[1] for weight in view.weights.values()})))
        raise UserError(f"{pattern}: {pattern.m} divides the inputs of no layer, which are {widths}: choose another M")


def one_shot(
    pruner: Any,
    view: PrunableView,
    data: Any,
    fabric: Any,
    target: Target,
    seed: int,
    *,
    folder: Path | None = None,
    config: Any = None,
) -> Masks:
    """The masks that are asked for. data: of `engine.pruning.run.calibrate`; None where the pruner reads none. folder,
    config: of `calibrate`, for a run that is to go on after a kill.
    """
    measure = partial(calibrate, pruner, view, data, fabric, seed, folder=folder, config=config)
    request = Request([] if target.sparsity is None else [target.sparsity], target.pattern, seed=seed)
    pruner.preflight(view, request)
    ((_, masks),) = pruner.masks(view, measure(), request, measure)
    check_finite(masks)
    return masks


def report(lines: Sequence[tuple[str, Metrics]], view: PrunableView, written: Sequence[Path]) -> str:
    """A table of accuracies, the share of zeros in the model as it is, and the files."""
    metrics = {"top1": "top-1", "top5": "top-5"}
    rows = [
        {"model": name, **{told: f"{m[key]:.2f}" for key, told in metrics.items() if key in m}} for name, m in lines
    ]
    zero = view.numel - sum(int(torch.count_nonzero(weight.parameter)) for weight in view.weights.values())
    share = f"{zero:,} of {view.numel:,} prunable weights are zero ({100 * zero / view.numel:.2f} %)"
    return "\n".join(["", markdown_table(rows), "", share, *(f"written: {path}" for path in written)])


def save(
    model: nn.Module, path: Path, masks: Masks | None, halves: Mapping[str, torch.dtype] | None = None
) -> list[Path]:
    """The state dict, as safetensors where the name says so, else as torch writes it, and the masks beside it.

    halves: of `sparsity.view.PrunableView`.
    """
    if path.suffix == ".safetensors":
        save_weights(model, path, halves=halves, allowed=("vanished",))
    else:
        with as_published(model, halves or {}), replacing(path) as temporary:
            state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
            with temporary.open("wb") as file:  # opened here, so that a full disk says so
                torch.save(state, file)
    if masks is None:
        return [path]
    beside = path.with_name(f"{path.name.removesuffix('.tar').rpartition('.')[0]}_pruning_masks.safetensors")
    masks.save(beside)
    return [path, beside]
