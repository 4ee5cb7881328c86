"""A task of a model of another library, as `Finetuning` trains it; the model itself stands in it unchanged.

The file models/foreign/<task>.py has the task of every model of timm or transformers, as models/<model>/<task>.py has
that of one of this project (see models/parts/task_model.py): `models.find_task` finds both. It offers
- `build(name, config, ...)` -> a `ForeignTaskModel`, from what --model says and the task's configuration;
- `NEW`, `prunable_view`, `task_names`, which it imports from this file, and
- `save(model, folder)`, which writes what has been trained as its library loads it.
Names of weights in masks and in the view are the library's own, as prune.py writes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.external import model as external
from models.external.layer_names import blocks_of
from models.external.libraries import Transformers, library_of
from models.parts.task_model import TaskModel
from sparsity.files import INDEX, SAVED
from sparsity.masks import state_digest
from sparsity.view import PrunableView

NEW = ()  # of all models; each says what it has of new weights, as `TaskModel.new`


@dataclass(frozen=True)
class Source:
    """The model that a run trains: its name, and a digest of its weights as they are before the mask."""

    model: str
    state: str


class ForeignTaskModel(TaskModel):
    """A model of another library with the loss of one task.

    model: of the library. source: what --model says. fresh: names of the weights in `model` that are new.
    """

    def __init__(self, model: nn.Module, source: str, fresh: Sequence[str] = ()):
        super().__init__()
        self.model, self.source, self.fresh = model, source, tuple(fresh)

    @property
    def new(self) -> Sequence[str]:
        return [f"model.{name}" for name in self.fresh]

    def sizes(self) -> Source:
        """Return what a snapshot compares with the run that goes on."""
        return Source(self.source, state_digest(self.model))

    def told_source(self, weights: str) -> str:
        return f"{self.source}, weights: {weights}"

    def blocks(self) -> Sequence[nn.Module]:
        """Return the innermost of what the model repeats."""
        found = blocks_of(self.model)
        kept = {id(block) for block in found}
        return [b for b in found if not any(id(inner) in kept for inner in b.modules() if inner is not b)]

    def read_result(self, path: Path) -> dict[str, Tensor] | None:
        """Return the weights in a folder that transformers wrote: tied ones stand once in its files, and names may be
        others than those of the modules.
        """
        written = (path.name in SAVED or path.name.endswith(INDEX)) and (path.parent / "config.json").is_file()
        if not written or not isinstance(library_of(self.model), Transformers):
            return None
        options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
        model, found = type(self.model).from_pretrained(path.parent, **options)
        return {name: tensor for name, tensor in model.state_dict().items() if name not in found["missing_keys"]}

    def library_batch(self, batch: dict[str, Any]) -> Any:
        """Return a batch of the task as the library's model takes it, see models/external/libraries.py."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the model into a folder that is there, as its library loads it."""
        raise NotImplementedError


def prunable_view(model: ForeignTaskModel) -> PrunableView:
    """Return the weights that prune.py prunes in the model, with what runs it on batches of the task."""
    return external.prunable_view(model.model, read=model.library_batch)


def task_names(name: str) -> tuple[str, ...]:
    return (name,)


def save(model: ForeignTaskModel, folder: Path) -> None:
    """Write what has been trained into a folder that is there, as its library loads it."""
    model.save(folder)
