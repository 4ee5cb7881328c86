"""A linear layer whose N:M mask is learned (MaskLLM, arXiv 2409.17481)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsity.errors import UserError
from sparsity.learned.autograd import Again, MaskedProduct, MaskedWeight
from sparsity.learned.gates import candidates, choose, new_gate
from sparsity.pattern import NM


class Terms:
    """Hold what a training forward has summed up; a copy of the model begins without, since these have a graph."""

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> "Terms":
        memo[id(self)] = copied = Terms()
        return copied


class MaskedLayer(nn.Module):
    """A linear layer with a mask that is learned: `gate` (G, C), and two buffers that no state dict has: `setting`,
    scaling and tau, and `key`, of the next sample (without one, the global random state gives it).
    """

    pattern: NM
    hard: bool
    transposed: bool  # whether the weight is stored (in, out)
    folded: bool  # whether the weight holds the zeros of the mask already
    terms: Terms
    name: str  # of the weight, where several layers share `terms`
    gate: nn.Parameter
    setting: Tensor
    key: Tensor | None
    bias: nn.Parameter | None
    dense_kind: type[nn.Module]  # what the layer was, where it has become a `masked_kind`

    def learn_mask(self, gate: nn.Parameter, pattern: NM, hard: bool, *, transposed: bool = False) -> None:
        """Begin to have a mask; UserError where M does not divide the inputs."""
        self.pattern, self.hard, self.transposed, self.folded = pattern, hard, transposed, False
        self.terms, self.name = Terms(), ""
        self.register_parameter("gate", gate)
        self.register_buffer("setting", torch.ones(2, device=self.parameter.device), persistent=False)
        self.register_buffer("key", None, persistent=False)

    @property
    def scaling(self) -> float:
        return float(self.setting[0])

    @scaling.setter
    def scaling(self, value: float) -> None:
        self.anneal(value, self.tau)

    @property
    def tau(self) -> float:
        return float(self.setting[1])

    @tau.setter
    def tau(self, value: float) -> None:
        self.anneal(self.scaling, value)

    def anneal(self, scaling: float, tau: float) -> None:
        """A new tensor: the old one may be waited for by a backward pass."""
        if not tau > 0:
            raise UserError(f"tau must be above 0, got {tau!r}")
        self.setting = self.setting.new_tensor([scaling, tau])

    @property
    def parameter(self) -> nn.Parameter:
        """The weight without its mask."""
        weight = self._parameters["weight"]
        assert weight is not None, "a layer with a mask has a weight of its own"
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight without its mask, as (out, in)."""
        return self.parameter.t() if self.transposed else self.parameter

    @property
    def mask(self) -> Tensor:
        """bool (out, in): the candidates that the gate prefers as it is now."""
        return choose(self.gate, self.pattern).view(self.matrix.shape)

    def sparse_weight_reg(self) -> Tensor:
        """||W * mask||^2 of the last training forward, for which W is a constant."""
        return self.terms.norms[self.name]

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return F.linear(x, self.matrix, self.bias)
        if not self.training:
            return F.linear(x, self.matrix * self.mask, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        again, x = Again.of(x, dtype), x.to(dtype)
        y, norm = MaskedProduct.apply(x, self.matrix, self.bias, *self._sample(), again)
        self.terms.norms[self.name] = norm
        return y

    def masked_weight(self) -> Tensor:
        """Return what `forward` multiplies with, in the parameter's own layout."""
        if self.folded:
            return self.parameter
        if self.training:
            masked, self.terms.norms[self.name] = MaskedWeight.apply(self.matrix, *self._sample())
        else:
            masked = self.matrix * self.mask
        return masked.t() if self.transposed else masked

    def _sample(self) -> tuple[Tensor, Tensor, Tensor, int, int, bool]:
        """Return what the functions below draw a mask from."""
        key = self.key
        if key is None:
            key = torch.randint(-(1 << 31), 1 << 31, (2,), dtype=torch.int32, device=self.gate.device)
        return self.gate, key, self.setting, self.pattern.n, self.pattern.m, self.hard

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.pattern}, hard={self.hard}"


class MaskedLinear(MaskedLayer, nn.Linear):
    """nn.Linear whose mask is learned, N of every M inputs; the quick start of the public code.

    gate_init_std: of the first gates. tau and scaling may be set at any time. hard: compute with the sampled candidate
    itself, with the gradient of the mixture. The state dict has `weight`, `bias` and `gate`.

    Raises UserError unless 1 <= N < M, tau > 0 and M divides in_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        N: int = 2,
        M: int = 4,
        gate_init_std: float = 0.2,
        tau: float = 1.0,
        hard: bool = False,
        scaling: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        pattern = checked_pattern(N, M)
        if not pattern.fits(in_features):
            raise UserError(f"a layer with {in_features} inputs does not divide into groups of {M}")
        gate = new_gate(self.weight.numel() // M, pattern, gate_init_std)
        self.learn_mask(nn.Parameter(gate.to(**gate_place(self.weight))), pattern, hard)
        self.tau, self.scaling = tau, scaling

    def load_mask_prior(self, prior: Tensor, prior_strength: float = 3.0) -> None:
        """Prefer a mask (out, in) of ones and zeros; see `add_prior`."""
        add_prior(self.gate, prior, self.pattern, prior_strength)


class MaskedLinearFrozen(nn.Linear):
    """nn.Linear with a fixed mask, a buffer (out, in) of ones and zeros; at first all ones."""

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.register_buffer("mask", torch.ones_like(self.weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class _Read(MaskedLayer):
    """A layer whose weight is masked for those who read it, too: models (timm's EVA, BEiT, Swin V2) that multiply with
    it themselves, and layers with a forward of their own.
    """

    @property
    def weight(self) -> Tensor:
        return self.masked_weight()


@cache
def masked_kind(kind: type[nn.Module], calls: bool) -> type[nn.Module]:
    """The class of a layer with a mask. calls: its forward is that of a linear layer, and may be ours. The name stays,
    by which transformers' Conv1D is known.
    """
    ours = MaskedLinear if kind is nn.Linear else MaskedLayer
    name = ours.__name__ if kind is nn.Linear else kind.__name__
    bases = (_Read, ours) if kind is nn.Linear else (_Read, ours, kind)
    own = {} if calls else {"forward": kind.forward}
    return type(name, bases, {"__module__": kind.__module__, "dense_kind": kind, **own})


def checked_pattern(n: int, m: int) -> NM:
    """Raise UserError unless 1 <= N < M."""
    if not 1 <= n < m:
        raise UserError(f"N of every M weights are kept, 1 <= N < M, got N = {n!r} and M = {m!r}")
    return NM(n, m)


def gate_place(weight: Tensor) -> dict[str, Any]:
    """Return device and dtype of a weight's gate; in half precision the steps of the optimizer would be lost."""
    return {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}


def add_prior(gate: Tensor, prior: Tensor, pattern: NM, strength: float) -> None:
    """gate += strength * std(gate) * (<candidate, prior> - N^2 / M), in place: per group, how many of the weights that
    the prior (out, in) keeps a candidate keeps, above what chance would; std before it is added.
    """
    kept = candidates(pattern).to(gate)
    with torch.no_grad():
        spread = float(gate.std()) if gate.numel() > 1 else 1.0
        agreement = kept @ prior.to(gate).reshape(-1, pattern.m).t()  # (C, G)
        gate.add_((agreement - pattern.n**2 / pattern.m).t(), alpha=strength * spread)


def masked(module: nn.Module) -> MaskedLayer:
    """Return a layer that is known to have a mask."""
    assert isinstance(module, MaskedLayer), "its mask was attached, and not yet detached"
    return module


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """The layers of a model whose masks are learned."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MaskedLayer))


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside the block the weights hold the zeros of the masks, computed once; afterwards they are what they were.

    For evaluations of many batches. Neither gates nor weights may change inside.
    """
    before: dict[int, tuple[nn.Parameter, Tensor]] = {}
    layers = [layer for _, layer in masked_layers(model)]
    try:
        for layer in layers:
            layer.folded, own = True, layer.parameter
            if id(own) not in before:
                before[id(own)] = (own, own.data)
                own.data = own.data * (layer.mask.t() if layer.transposed else layer.mask)
        yield
    finally:
        for own, data in before.values():
            own.data = data
        for layer in layers:
            layer.folded = False
