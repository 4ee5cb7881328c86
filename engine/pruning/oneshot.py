"""One-shot N:M pruning around its pruner: what a run asks for, reports and writes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.export import as_published, save_weights
from engine.options.oneshot import Target
from engine.pruning import run
from engine.reports.report import Metrics, markdown_table
from sparsity.files import replacing
from sparsity.masks import Masks
from sparsity.run.engine import Engine
from sparsity.run.request import Request
from sparsity.view import PrunableView


def one_shot(
    engine: Engine,
    view: PrunableView,
    data: Any,
    fabric: Any,
    target: Target,
    seed: int,
    *,
    folder: Path | None = None,
    config: Any = None,
) -> Masks:
    """Return the masks that are asked for. data: of `engine.pruning.run.calibrations`; None where the plan reads none.
    folder, config: of `calibrations`, for a run that is to go on after a kill.
    """
    passes = run.calibrations(data, fabric, seed, engine.name, folder=folder, config=config)
    wanted = request(target, seed)
    ((_, masks),) = engine.masks(view, engine.measure(view, passes(0), wanted), wanted, passes)
    run.check_finite(masks)
    return masks


def preflight(engine: Engine, view: PrunableView, target: Target, seed: int, processes: int = 1) -> None:
    """Raise UserError for what this model cannot have or this machine has no memory for. processes: on this machine."""
    run.preflight(engine, view, request(target, seed), processes=processes)


def request(target: Target, seed: int) -> Request:
    """Return what is asked of the engine."""
    return Request([] if target.sparsity is None else [target.sparsity], target.pattern, seed=seed)


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
