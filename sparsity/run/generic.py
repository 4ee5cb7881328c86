"""The view of a module of which nothing is known: every linear layer is prunable, and a batch is its arguments."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsity.errors import UserError
from sparsity.view import PrunableView


def generic_view(model: nn.Module | PrunableView) -> PrunableView:
    """Return a view of a module: one group, "model", and the blocks of its longest list of blocks of one kind.

    A view is returned as it is. The loss of a batch is what the model returns as "loss", or itself where that is a
    scalar; UserError where it is neither.
    """
    if isinstance(model, PrunableView):
        return model

    def forward(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)

    def loss(batch: Any, generator: Any = None) -> Tensor:
        output = forward(batch)
        found = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise UserError("the model returns no loss for a batch: give a view with a loss (sparsity.PrunableView)")
        return found

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    alike = [module for module in lists if len(module) > 1 and len({type(child) for child in module}) == 1]
    blocks = max(alike, key=len, default=None)
    blocks = list(blocks) if blocks is not None and not isinstance(blocks[0], nn.Linear) else None
    return PrunableView(model, group_of=lambda key: "model", forward=forward, loss=loss, blocks=blocks)
