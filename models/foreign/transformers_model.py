"""Models of transformers that read images and texts, as their tasks load and write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.external import model as external
from models.external.preprocessing import load_processor
from models.foreign.task_model import ForeignTaskModel
from sparsity.errors import UserError
from sparsity.files import writing


class Asked(Protocol):
    """The part of a configuration that names weights, see `configs.foreign.ForeignConfig`."""

    weights: str
    weights_key: str


class TransformersTask(ForeignTaskModel):
    """A task whose results are a folder as save_pretrained writes it, with the processor."""

    processor: Any

    def save(self, folder: Path) -> None:
        """Write the model and its processor into a folder that is there."""
        with writing(folder / "model.safetensors"):
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def stacked(items: Sequence[dict[str, Any]], name: str) -> dict[str, Tensor]:
    """Return the field of a batch (B,) that has the numbers of its items under the same name."""
    return {name: torch.stack([item[name] for item in items])}


def processor_of(model: nn.Module) -> Any:
    """Return the processor of a model; UserError where it is not to be had."""
    name = model.name_or_path
    way_out = "give a folder that has the processor, too, or the name of a model on the hub"
    return load_processor(name, f"--model hf:{name}: ", way_out)


def loaded(name: str, config: Asked) -> nn.Module:
    """Return the model of transformers that --model names, in float32; UserError where it is not to be had, or is of
    another library.
    """
    if not name.startswith("hf:"):
        raise UserError(
            f"--model {name}: models that read images and texts are of transformers: give hf:NAME_OR_FOLDER"
        )
    return external.build(name, config.weights, config.weights_key)
