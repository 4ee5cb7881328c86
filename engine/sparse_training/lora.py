"""Sparse low-rank adaptation: adapters learn in place of weights, and zeros stay (arXiv 2312.15230).

The weight of a layer is W_eff = (W + (a / R) B A) * M, a = 2 R. The parameters of the model are W_eff throughout, so
that nothing is added to it and it computes as fast as it did; the gradient of A and of B follows from that of W_eff by
the chain rule, and after each step W_eff is computed again. What is saved is merged already.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from engine.sparse_training.held import Derived
from sparsity.view import PrunableView

SCALE = 2.0  # a / R


class Adapters:
    """A (R, in), uniform within 1 / sqrt(in) as a layer of torch begins, and B (out, R), zero, of each prunable weight
    that learns. All other parameters are frozen from here on, but for the `new` ones (globs), the task's own head.
    model: the task model, where the view is of a model in it.
    """

    def __init__(
        self,
        view: PrunableView,
        rank: int,
        new: Sequence[str],
        seed: int,
        device: torch.device,
        model: nn.Module | None = None,
    ):
        self.rank, self.a, self.b = rank, {}, {}
        generator = torch.Generator().manual_seed(seed)
        for name, weight in view.weights.items():
            if weight.parameter.requires_grad:
                outputs, inputs = weight.shape
                a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
                self.a[name] = nn.Parameter(a.to(device))
                self.b[name] = nn.Parameter(torch.zeros(outputs, rank, device=device))
        adapted = {id(view.weights[name].parameter) for name in self.a}
        model = view.model if model is None else model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapted]
        self._own = {name: p for name, p in named if any(fnmatchcase(name, glob) for glob in new)}
        for name, parameter in named:
            parameter.requires_grad_(name in self._own)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained: the adapters of one weight after the other, then the parameters of the task's head."""
        for name in self.a:
            yield f"{name}.lora_a", self.a[name]
            yield f"{name}.lora_b", self.b[name]
        yield from self._own.items()

    @property
    def numel(self) -> int:
        """Return how many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def update(self, name: str) -> Tensor:
        """Return (a / R) B A of a weight, (out, in)."""
        return SCALE * self.b[name] @ self.a[name]


class Adapted(Derived):
    """Adapters learn; see the module. Masks, and those of gradual pruning by |W_eff|, hold as for `Held`."""

    @torch.no_grad()
    def __init__(self, view: PrunableView, *args: Any, adapters: Adapters, **options: Any):
        super().__init__(view, *args, **options)
        self._adapters = adapters
        self._bases = {name: view.weights[name].parameter.detach().clone() for name in adapters.a}  # W * M

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the adapters their gradients: with G that of W_eff, times M, (a / R) G A' and (a / R) B' G."""
        for name, a in self._adapters.a.items():
            weight, b = self.view.weights[name], self._adapters.b[name]
            parameter = weight.parameter
            if parameter.grad is None:  # the loss does not depend on it
                continue
            if name in self._gone:
                parameter.grad.masked_fill_(self._gone[name], 0)
            gradient = weight.as_matrix(parameter.grad).to(a.dtype)  # (out, in)
            b.grad, a.grad = SCALE * gradient @ a.t(), SCALE * b.t() @ gradient
            parameter.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        for name, base in self._bases.items():
            weight = self.view.weights[name]
            weight.parameter.copy_(base + weight.as_stored(self._adapters.update(name)))
        self._zero()

    def state_dict(self) -> dict[str, Any]:
        parts = {key: {name: t.detach() for name, t in own.items()} for key, own in self._parts().items()}
        return super().state_dict() | parts

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, own in self._parts().items():
            for name, tensor in own.items():
                tensor.copy_(state[key][name])
        super().load_state_dict(state)

    def _parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {"a": self._adapters.a, "b": self._adapters.b, "bases": self._bases}
