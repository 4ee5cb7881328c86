"""A task model that learns its task and, at the same time, to give what the dense model gives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.sparse_training.distillation import distillation
from sparsity.errors import UserError
from sparsity.view import Outputs, PrunableView


class Taught(nn.Module):
    """Wrap a task model: `model(batch, epoch)` is (1 - W) times its loss plus W times the distillation loss.

    teacher: gives the outputs of the view, frozen, in evaluation mode; no part of what is trained or saved: the state
    dict is the task model's own. untaught: outputs in which the teacher has nothing to teach. At W = 1 the loss of the
    task is not computed, and labels are not read. model: the task model, where the view is of a model in it.
    """

    def __init__(
        self,
        view: PrunableView,
        teacher: nn.Module,
        weight: float,
        untaught: Sequence[str] = (),
        model: nn.Module | None = None,
    ):
        super().__init__()
        self.model: nn.Module = view.model if model is None else model
        self.weight, self.untaught = weight, tuple(untaught)
        self.teachers = [teacher.eval().requires_grad_(False)]  # a list, so that it is no module of this one
        self._view = view

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """Return "loss", the parts of the task's, its loss as "task", and the distillation's as "distill"."""
        with torch.no_grad():
            wanted = self._taught(self._view.outputs(batch, *self.teachers))
        if self.weight == 1:
            match = distillation(self._taught(self._view.outputs(batch)), wanted)["loss"]
            return {"loss": match, "distill": match}
        task_model: Any = self.model  # of models/parts/task_model.py
        losses, own = task_model.taught(batch, epoch, self._view.outputs)
        match = distillation(self._taught(own), wanted)["loss"]
        loss = (1 - self.weight) * losses["loss"] + self.weight * match
        return losses | {"loss": loss, "task": losses["loss"], "distill": match}

    def _taught(self, outputs: Outputs) -> Outputs:
        """Return what the teacher has to teach of some outputs. UserError where that is nothing."""
        found = {name: output for name, output in outputs.items() if name not in self.untaught}
        if not found:
            raise UserError(
                f"--distill: the weights that the run starts from have no {', '.join(self.untaught)} to teach (the head"
                " is new), and nothing else: give --teacher FILE, or leave --distill out"
            )
        return found

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*args, **options)
