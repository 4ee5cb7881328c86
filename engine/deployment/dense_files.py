"""A model with its zeros as other programs load it: a folder with `model.safetensors`, `config.json`, what prepares its
inputs, and a model card.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.export import save_model, save_weights
from engine.reports.model_card import model_card
from sparsity.files import write_atomic
from sparsity.masks import Masks
from sparsity.view import PrunableView

FILE = "model.safetensors"


def write_dense(
    view: PrunableView,
    folder: Path,
    files: Mapping[str, Mapping[str, Any]],
    masks: Masks,
    facts: Mapping[str, str],
    command: str,
) -> None:
    """Write a pruned model as `save_folder` does, with a model card. facts: lines of it, "model" among them. command:
    what made this.
    """
    save_folder(view.model, folder, view.halves, files)
    card = model_card(f"{facts['model']}, pruned", facts, masks, view, {}, command)
    write_atomic(folder / "README.md", card.encode())


def save_folder(
    model: nn.Module, folder: Path, halves: Mapping[str, torch.dtype], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a model as transformers or timm loads it, or with the files that are given.

    halves: of `sparsity.view.PrunableView`. files: name -> content, as JSON, beside a model of neither library.
    """
    kind = type(model).__module__
    if kind.startswith("transformers."):
        save_model(model, folder, halves)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind.startswith("timm."):
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)  # with the configuration; the weights as they are
    save_weights(model, folder / FILE, halves=halves, allowed=("vanished",))
    for name, content in files.items():
        write_atomic(folder / name, (json.dumps(content, indent=2) + "\n").encode())
