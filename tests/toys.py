"""Small models for tests, views of them, and threads in place of ranks."""

from threading import Barrier, Lock

import torch
from torch import Tensor, nn

from sparsity.view import PrunableView
from tests.processes import PATIENCE


def view_of(model: nn.Module, **options) -> PrunableView:
    """A view with one group per top-level module, whose batches are inputs of the model."""
    defaults = {"group_of": lambda name: name.split(".")[0], "forward": model}
    return PrunableView(model, **{**defaults, **options})


def layers(*shapes: tuple[int, int], seed: int = 0) -> nn.ModuleDict:
    """Linear layers "a", "b", ... of the given (out, in), without bias."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict()
    for letter, (outputs, inputs) in zip("abcdefgh", shapes, strict=False):
        model[letter] = nn.Linear(inputs, outputs, bias=False)
        model[letter].weight.data = torch.randn(outputs, inputs, generator=generator)
    return model


class Attention(nn.Module):
    """Query, key and value read the same tensor; `again` is tied to `up`; a head."""

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


class Conv1D(nn.Module):
    """As transformers has it: a linear layer that stores (in, out)."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Ranks:
    """`reduce` for threads in place of ranks."""

    def __init__(self, number: int):
        self.barrier, self.lock, self.total = Barrier(number, timeout=PATIENCE), Lock(), None

    def __call__(self, tensor: Tensor) -> Tensor:
        with self.lock:
            self.total = tensor.clone() if self.total is None else self.total + tensor
        self.barrier.wait()
        total = self.total.clone()
        if self.barrier.wait() == 0:
            self.total = None
        self.barrier.wait()
        return total
