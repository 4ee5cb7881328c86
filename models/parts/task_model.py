"""Interface of a task model, as the fine-tuning scripts use it.

A task of a model is the file models/<model>_<task>.py, which `models.find_task` finds. It offers
- `TEXT`, keyword arguments of `datasets.text.TextEncoder`: the task's template of tokens;
- `NEW`, globs of parameters that the pretrained model does not have: they learn at lr x lr_mult;
- `build(config, weights, **options)` -> `TaskModel`, from a checkpoint of the pretrained model or of the task (random
  without one); config holds the sizes of the pretrained model, options are what the task's configuration adds;
- `prunable_view(model)` -> `sparsity.view.PrunableView`: which of its weights a mask holds, and its `outputs`, by which
  a dense model teaches it (`--distill`);
- `task_names(name)` -> names in the task model of what the pretrained model calls `name`: none, one or several. A name
  of the task model stands for itself. It translates checkpoints and masks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsity.view import Outputs


class TaskModel(nn.Module):
    """A model with the loss of one task.

    untaught: outputs of its view that newly initialised parameters decide, so that the model as it is built has nothing
    to teach there. new: globs of the parameters that are new, beside the module's `NEW`.
    """

    new: Sequence[str] = ()
    untaught: Sequence[str] = ()

    def forward(self, batch: dict[str, Any], epoch: float = 0.0) -> dict[str, Tensor]:
        """{"loss": what is minimised, and its parts}. epoch: how many are done, with fractions."""
        raise NotImplementedError

    def taught(
        self, batch: dict[str, Any], epoch: float, outputs: Callable[[dict[str, Any]], Outputs]
    ) -> tuple[dict[str, Tensor], Outputs]:
        """Return the losses of `forward` and what the view's `outputs` gives for the batch, for a model that is taught
        by another one: in two passes, unless a model gets both out of one.
        """
        return self(batch, epoch), outputs(batch)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks that gradient checkpointing computes again in the backward pass, one by one."""
        raise NotImplementedError

    def heirs(self, name: str) -> Sequence[str]:
        """The weights that begin as copies of the weight `name` of this model and take its mask."""
        return ()

    def told_source(self, weights: str) -> str:
        """Return what a log calls the model that training begins with. weights: the configuration's."""
        return weights

    def read_result(self, path: Path) -> dict[str, Tensor] | None:
        """Return the weights of a result that does not have them under the names of the view's model, under those; None
        where it does.
        """
        return None

    def on_step(self) -> None:
        """Called after each step of the optimizer: what follows the weights moves here, once, not with each batch."""

    def on_pruned(self) -> None:
        """Called once, when the masks have been applied: copies of the weights begin here."""
