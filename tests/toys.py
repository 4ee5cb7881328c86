"""Small models for tests: a tree of linear layers made from a state dict, and views of plain modules."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparsity.view import PrunableView


def stub_tree(state: Mapping[str, Tensor], names: Iterable[str]) -> nn.Module:
    """A module tree with one nn.Linear (without bias) for each of the weight names, in their order, holding the weights
    of the state dict.
    """
    root = nn.Module()
    for name in names:
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        linear = nn.Linear(state[name].shape[1], state[name].shape[0], bias=False)
        linear.weight.data = state[name].clone()
        parent.add_module(leaf, linear)
    return root


def view_of(model: nn.Module, **options) -> PrunableView:
    """A view with one group per top-level module, whose batches are inputs of the model."""
    defaults = {"group_of": lambda name: name.split(".")[0], "forward": model}
    return PrunableView(model, **{**defaults, **options})


class Attention(nn.Module):
    """Query, key and value read the same tensor; two blocks, a tied pair and a head."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.again = nn.Linear(width, 2 * width)
        self.again.weight = self.up.weight
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:  # (..., width)
        mixed = torch.softmax(self.q(x) * self.k(x), dim=-1) * self.v(x)
        return self.head(self.down(self.up(mixed).relu() + self.again(x).relu()))
