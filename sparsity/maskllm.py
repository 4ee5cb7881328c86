"""Learnable N:M masks: MaskLLM (arXiv 2409.17481).

    masks = LearnableMasks(view, NM(2, 4), seed=0)           # the model's layers have gates now
    masks.start_from(Masks.load("prior.safetensors"), 3.0)
    masks.anneal(scaling=10.0, tau=4.0)
    masks.draw(step)                                         # the noise of a step
    loss = view.loss(batch) - 1e-5 * masks.squared_weight()
    masks.masks()                                            # what has been learned

A layer stays what it is, with its weight under its name; it gets a parameter `gate` beside it, and computes with the
weight times its mask: while it trains with one that is sampled, else with the candidates that the gate prefers now. So
does what reads `layer.weight` itself; the parameter is `layer.parameter`. Weights that are tied share one gate and one
sample.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import comb
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from sparsity.learned.gates import Sampled, candidates, choose, new_gate
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.view import PrunableView, PrunableWeight

logger = logging.getLogger(__name__)

GATE, MASK = ".gate", ".mask"
_NESTED = ".diff_mask"  # where the public code for language models has gate and candidates
_STATE = ("state_dict", "state_dict_ema", "model", "module")  # under which a checkpoint holds its tensors


class _Terms:
    """What a training forward has summed up; a copy of the model begins without, since these have a graph."""

    def __init__(self) -> None:
        self.norms: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> "_Terms":
        memo[id(self)] = copied = _Terms()
        return copied


class _Layer(nn.Module):
    """What a linear layer gets: `gate` (G, C), and two buffers that no state dict has: `setting`, scaling and tau, and
    `key`, of the next sample (without one, the global random state gives it).
    """

    pattern: NM
    hard: bool
    transposed: bool  # whether the weight is stored (in, out)
    folded: bool  # whether the weight holds the zeros of the mask already

    def learn_mask(self, gate: nn.Parameter, pattern: NM, hard: bool, *, transposed: bool = False) -> None:
        """Begin to have a mask; ValueError where M does not divide the inputs."""
        self.pattern, self.hard, self.transposed, self.folded = pattern, hard, transposed, False
        self.terms, self.name = _Terms(), ""
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
            raise ValueError(f"tau must be above 0, got {tau!r}")
        self.setting = self.setting.new_tensor([scaling, tau])

    @property
    def parameter(self) -> nn.Parameter:
        """The weight without its mask."""
        return self._parameters["weight"]

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
        again, x = _Again.of(x, dtype), x.to(dtype)
        y, norm = _MaskedLinear.apply(x, self.matrix, self.bias, *self._sample(), again)
        self.terms.norms[self.name] = norm
        return y

    def masked_weight(self) -> Tensor:
        """What `forward` multiplies with, in the parameter's own layout."""
        if self.folded:
            return self.parameter
        if self.training:
            masked, self.terms.norms[self.name] = _MaskedWeight.apply(self.matrix, *self._sample())
        else:
            masked = self.matrix * self.mask
        return masked.t() if self.transposed else masked

    def _sample(self) -> tuple[Tensor, Tensor, Tensor, int, int, bool]:
        """What the functions below draw a mask from."""
        key = self.key
        if key is None:
            key = torch.randint(-(1 << 31), 1 << 31, (2,), dtype=torch.int32, device=self.gate.device)
        return self.gate, key, self.setting, self.pattern.n, self.pattern.m, self.hard

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.pattern}, hard={self.hard}"


class _MaskedLinear(Function):
    """x (..., in) -> x @ (W * sample)^T + b (..., out), and ||W * sample||^2.

    Kept for the backward pass: x, where it cannot be had again (`_Again`), and what is there anyway (W, gate, key). The
    sample is drawn again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gate, key, setting, n, m, hard, again):
        masked, norm = Sampled(weight, gate, key, setting, NM(n, m), hard).masked(x.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if again is None else None, weight, gate, key, setting)
        ctx.options, ctx.again, ctx.shape = (NM(n, m), hard), again, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, masked, None if bias is None else bias.to(x.dtype)), norm

    @staticmethod
    def backward(ctx, of_y, of_norm):
        x, weight, gate, key, setting = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream = of_y.reshape(-1, of_y.shape[-1])
        of_masked = upstream.t() @ x.reshape(-1, x.shape[-1]) if ctx.again is None else ctx.again.product(upstream)
        masked, of_gate, of_weight = Sampled(weight, gate, key, setting, *ctx.options).backward(
            of_masked, of_norm, wants_weight
        )
        of_x = (upstream @ masked).view(ctx.shape) if wants_x else None
        of_bias = upstream.sum(dim=0).to(ctx.bias_dtype) if wants_bias else None
        return of_x, of_weight, of_bias, of_gate, None, None, None, None, None, None


class _MaskedWeight(Function):
    """W * sample (out, in), and ||W * sample||^2, where the product is not taken here. Nothing is kept either."""

    @staticmethod
    def forward(ctx, weight, gate, key, setting, n, m, hard):
        ctx.save_for_backward(weight, gate, key, setting)
        ctx.options = NM(n, m), hard
        return Sampled(weight, gate, key, setting, *ctx.options).masked(weight.dtype)

    @staticmethod
    def backward(ctx, of_masked, of_norm):
        sampled = Sampled(*ctx.saved_tensors, *ctx.options)
        _, of_gate, of_weight = sampled.backward(of_masked.clone(), of_norm, ctx.needs_input_grad[0])
        return of_weight, of_gate, None, None, None, None, None


def _normalised(node: Any, rows: slice) -> Tensor:
    """Of layer norm over the last dimension."""
    x, mean, scale = (
        tensor.reshape(-1, tensor.shape[-1])[rows]
        for tensor in (node._saved_input, node._saved_result1, node._saved_result2)
    )
    x = (x - mean).mul_(scale)
    x = x if node._saved_weight is None else x.mul_(node._saved_weight)
    return x if node._saved_bias is None else x.add_(node._saved_bias)


def _gelu(node: Any, rows: slice) -> Tensor:
    x = node._saved_self
    return F.gelu(x.reshape(-1, x.shape[-1])[rows], approximate=node._saved_approximate)


def _silu(node: Any, rows: slice) -> Tensor:
    return F.silu(node._saved_self.reshape(-1, node._saved_self.shape[-1])[rows])


class _Again:
    """The input of a layer, computed again from what the backward pass of its maker keeps in any case.

    With frozen weights a dense layer does not keep its input, and most inputs are those of norms and activations: so a
    mask need not cost that memory either.
    """

    MAKERS: ClassVar = {"NativeLayerNormBackward0": _normalised, "GeluBackward0": _gelu, "SiluBackward0": _silu}
    ROWS = 512  # computed at a time

    def __init__(self, node: Any, dtype: torch.dtype):
        self.node, self.dtype = node, dtype

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> "_Again | None":
        """None where it is to be kept: it has another maker; a compiler decides for itself; and where hooks pack what
        the maker keeps, as checkpointing does, it may be unpacked once only.
        """
        if torch.compiler.is_compiling() or x.grad_fn is None or x.grad_fn.name() not in cls.MAKERS:
            return None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        flat = x.grad_fn.name() != "NativeLayerNormBackward0" or len(x.grad_fn._saved_normalized_shape) == 1
        return cls(x.grad_fn, dtype) if hooks is None and flat else None

    def product(self, upstream: Tensor) -> Tensor:
        """upstream (rows, out) -> upstream^T @ x (out, in)."""
        make = self.MAKERS[self.node.name()]
        if upstream.dtype in (torch.float16, torch.bfloat16):  # whose sums must not be rounded in between
            return upstream.t() @ make(self.node, slice(None)).to(self.dtype)
        total = None
        for first in range(0, len(upstream), self.ROWS):
            rows = slice(first, first + self.ROWS)
            own, x = upstream[rows].t(), make(self.node, rows).to(self.dtype)
            total = own @ x if total is None else total.addmm_(own, x)
        return total


class MaskedLinear(_Layer, nn.Linear):
    """nn.Linear whose mask is learned, N of every M inputs; the quick start of the public code.

    gate_init_std: of the first gates. tau and scaling may be set at any time. hard: compute with the sampled candidate
    itself, with the gradient of the mixture. The state dict has `weight`, `bias` and `gate`.

    Raises ValueError unless 1 <= N < M, tau > 0 and M divides in_features.
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
            raise ValueError(f"a layer with {in_features} inputs does not divide into groups of {M}")
        gate = new_gate(self.weight.numel() // M, pattern, gate_init_std)
        self.learn_mask(nn.Parameter(gate.to(**_gate_place(self.weight))), pattern, hard)
        self.tau, self.scaling = tau, scaling

    def load_mask_prior(self, prior: Tensor, prior_strength: float = 3.0) -> None:
        """Prefer a mask (out, in) of ones and zeros; see `add_prior`."""
        add_prior(self.gate, prior, self.pattern, prior_strength)


class MaskedLinearFrozen(nn.Linear):
    """nn.Linear with a fixed mask, a buffer (out, in) of ones and zeros; at first all ones."""

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


class _Read:
    """A layer whose weight is masked for those who read it, too: models (timm's EVA, BEiT, Swin V2) that multiply with
    it themselves, and layers with a forward of their own.
    """

    @property
    def weight(self) -> Tensor:
        return self.masked_weight()


@cache
def _kind(kind: type[nn.Module], calls: bool) -> type[nn.Module]:
    """The class of a layer with a mask. calls: its forward is that of a linear layer, and may be ours. The name stays,
    by which transformers' Conv1D is known.
    """
    ours = MaskedLinear if kind is nn.Linear else _Layer
    name = ours.__name__ if kind is nn.Linear else kind.__name__
    bases = (_Read, ours) if kind is nn.Linear else (_Read, ours, kind)
    own = {} if calls else {"forward": kind.forward}
    return type(name, bases, {"__module__": kind.__module__, "dense_kind": kind, **own})


def checked_pattern(n: int, m: int) -> NM:
    """ValueError unless 1 <= N < M."""
    if not 1 <= n < m:
        raise ValueError(f"N of every M weights are kept, 1 <= N < M, got N = {n!r} and M = {m!r}")
    return NM(n, m)


def _gate_place(weight: Tensor) -> dict[str, Any]:
    """Where the gate of a weight is; in half precision it would lose the steps of the optimizer."""
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


class LearnableMasks:
    """The gates of a model's prunable weights. The model's layers are given them here, and lose them in `detach`.

    names: of the weights that have one; a layer whose inputs M does not divide stays dense, with a warning.
    gate_std, seed: the first gates are N(0, gate_std^2), a function of the seed and the layers.

    Raises ValueError where no layer divides into groups of M, or one has a gate already.
    """

    def __init__(self, view: PrunableView, pattern: NM, *, hard: bool = False, gate_std: float = 0.2, seed: int = 0):
        self.view, self.pattern, self.seed = view, checked_pattern(pattern.n, pattern.m), seed
        fitting = {name: weight for name, weight in view.weights.items() if pattern.fits(weight.shape[1])}
        rest = [f"{name} ({weight.shape[1]} inputs)" for name, weight in view.weights.items() if name not in fitting]
        if not fitting:
            raise ValueError(f"no layer of this model divides into groups of {pattern.m} inputs: choose another M")
        if rest:
            logger.warning("these layers do not divide into groups of %d and stay dense: %s", pattern.m, _some(rest))
        generator = torch.Generator().manual_seed(seed)
        self.gates: dict[str, nn.Parameter] = {}
        self._weights, self._terms = fitting, _Terms()
        for name, weight in fitting.items():
            gate = new_gate(weight.numel // pattern.m, pattern, gate_std, generator)
            self.gates[name] = nn.Parameter(gate.to(**_gate_place(weight.parameter)))
            for module in weight.modules:
                self._attach(name, weight, module, hard)

    def _attach(self, name: str, weight: PrunableWeight, module: nn.Module, hard: bool) -> None:
        if isinstance(module, _Layer):
            raise ValueError(f"layer {name!r} has a learnable mask already")
        calls = weight.transposed or type(module).forward is nn.Linear.forward
        module.__class__ = _kind(type(module), calls)
        module.learn_mask(self.gates[name], self.pattern, hard, transposed=weight.transposed)
        module.terms, module.name = self._terms, name

    def layers(self) -> Iterator[tuple[str, _Layer]]:
        """Every layer with the name of its weight, a tied one's several."""
        return ((name, module) for name, weight in self._weights.items() for module in weight.modules)

    def freeze_weights(self) -> None:
        """Nothing but the gates learns."""
        gates = {id(gate) for gate in self.gates.values()}
        for parameter in self.view.model.parameters():
            parameter.requires_grad_(id(parameter) in gates)

    def start_from(self, prior: Masks, strength: float) -> None:
        """Prefer the candidates that agree with these masks (`add_prior`).

        Raises ValueError where they are another model's, or keep more than N of any M.
        """
        resolved = prior.resolve(self.view)
        for name, weight in self._weights.items():
            mask = _as_matrix(weight, resolved[name])
            most = int(mask.reshape(-1, self.pattern.m).sum(dim=1).max())
            if most > self.pattern.n:
                raise ValueError(
                    f"the prior is not {self.pattern}: it keeps {most} of {self.pattern.m} consecutive weights in "
                    f"{name}; prune with --pattern {self.pattern}"
                )
        for name, weight in self._weights.items():
            mask = _as_matrix(weight, resolved[name]).to(weight.parameter.device)
            add_prior(self.gates[name], mask, self.pattern, strength)

    def anneal(self, scaling: float, tau: float) -> None:
        """From the next forward pass on; ValueError unless tau is above 0."""
        for _, layer in self.layers():
            layer.anneal(scaling, tau)

    def draw(self, step: int) -> None:
        """The noise of the samples from here on: a function of the seed, the step and the weight alone, so that ranks
        and resumed runs draw the same.
        """
        for number, (name, weight) in enumerate(self._weights.items()):
            words = np.random.SeedSequence(self.seed, spawn_key=(step, number)).generate_state(2)
            key = torch.from_numpy(words.view(np.int32)).to(self.gates[name].device)
            for module in weight.modules:
                module.key = key

    def squared_weight(self) -> Tensor:
        """Sum over the weights of ||W * sample||^2 in the last training forward, once; W counts as a constant."""
        total = torch.stack(list(self._terms.norms.values())).sum()
        self._terms.norms.clear()
        return total

    def check_gradients(self) -> None:
        """ValueError naming a layer whose gate got none: the model reads its weight past the layer's forward."""
        idle = [name for name, gate in self.gates.items() if gate.grad is None]
        if idle:
            raise ValueError(
                f"the mask of {_some(idle)} cannot be learned: the loss does not depend on the layer; keep it dense "
                "(--exclude)"
            )

    def masks(self, provenance: Mapping[str, Any] | None = None) -> Masks:
        """What the gates prefer: exactly N of every M, and all of the layers that stay dense."""
        found = {
            name: weight.as_stored(next(m for m in weight.modules).mask)
            if name in self.gates
            else torch.ones(weight.parameter.shape, dtype=torch.bool)
            for name, weight in self.view.weights.items()
        }
        aliases = {weight.name: weight.aliases for weight in self.view.weights.values()}
        return Masks(found, {"pattern": str(self.pattern), **(provenance or {})}, aliases)

    def detach(self) -> None:
        """The layers as they were, without gates; the weights are not changed."""
        for _, layer in self.layers():
            del layer.gate, layer.setting, layer.key, layer.terms, layer.pattern, layer.hard, layer.transposed
            del layer.folded, layer.name
            layer.__class__ = layer.dense_kind


def masked_layers(model: nn.Module) -> Iterator[tuple[str, _Layer]]:
    """The layers of a model whose masks are learned."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _Layer))


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


def fold(
    state_dict: Mapping[str, Any],
    N: int | None = None,
    M: int | None = None,
) -> dict[str, Tensor]:
    """A checkpoint with masks beside the weights -> one of the dense model, with zeros in the weights.

    Of each layer `<layer>.gate` (G, C(M, N)), where it is there, else `<layer>.mask` (out, in); candidates in
    lexicographic order unless `<layer>.mask_options` (C, M) has them; also the names of the public code for language
    models, `<layer>.diff_mask.gate`. M follows from the shapes, and N from the number of candidates, but for cases like
    1:4 and 3:4, where a mask beside the gate decides, or N must be given. The state dict may be nested as timm's
    checkpoints are. Without gates and masks it comes back as it is.

    Raises ValueError, naming the layer, for shapes that do not fit.
    """
    state = _tensors(state_dict)
    layers = {key.removesuffix(kind): None for kind in (GATE, MASK) for key in state if key.endswith(kind)}
    layers = dict.fromkeys(layer.removesuffix(_NESTED) for layer in layers)
    extra = tuple(f"{layer}{nested}." for layer in layers for nested in ("", _NESTED))
    beside = ("gate", "mask", "mask_options", "_mask_options", "_extra_state")
    dropped = {prefix + name for prefix in extra for name in beside}
    result = {key: value for key, value in state.items() if key not in dropped}
    for layer in layers:
        weight = state.get(f"{layer}.weight")
        if weight is None:
            raise ValueError(f"the checkpoint has a mask of {layer!r}, but no {layer}.weight")
        result[f"{layer}.weight"] = weight * _mask_of(state, layer, weight, N, M).to(weight.device)
    return result


def _mask_of(state: Mapping[str, Tensor], layer: str, weight: Tensor, n: int | None, m: int | None) -> Tensor:
    """The mask (out, in) that a checkpoint has of a layer."""

    def found(*names: str) -> Tensor | None:
        return next((state[key] for name in names if (key := f"{layer}{name}") in state), None)

    gate, mask = found(GATE, _NESTED + GATE), found(MASK)
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(f"{layer}.mask has the shape {tuple(mask.shape)}, and its weight {tuple(weight.shape)}")
    if gate is None:
        return mask != 0
    if gate.ndim != 2 or weight.numel() % len(gate) or (m and weight.numel() != m * len(gate)):
        raise ValueError(f"{layer}.gate of the shape {tuple(gate.shape)} does not fit a weight {tuple(weight.shape)}")
    size = weight.numel() // len(gate)
    if weight.shape[1] % size:
        raise ValueError(f"the groups of {size} weights of {layer}.gate straddle the rows of {tuple(weight.shape)}")
    options = found(".mask_options", "._mask_options", f"{_NESTED}.mask_options")
    if options is not None:
        return options.reshape(-1, size).bool()[gate.argmax(dim=1)].view(weight.shape)
    fitting = [kept for kept in range(1, size) if comb(size, kept) == gate.shape[1] and n in (None, kept)]
    if len(fitting) > 1 and mask is not None and not mask.all():
        fitting = [kept for kept in fitting if kept * len(gate) == int(mask.count_nonzero())]
    if len(fitting) != 1:
        known = " or ".join(f"{kept}:{size}" for kept in fitting) or f"no N of {size}"
        raise ValueError(f"{layer}.gate has {gate.shape[1]} candidates, which is {known}: say which N and M it is")
    return choose(gate, NM(fitting[0], size)).view(weight.shape)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The innermost mapping of names to tensors, without what wrappers put in front of every name."""
    while not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in _STATE if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            raise ValueError("the checkpoint holds no tensors; expected a state dict, bare or under 'state_dict'")
        state = inner
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def _as_matrix(weight: PrunableWeight, mask: Tensor) -> Tensor:
    """A mask in the parameter's layout -> (out, in)."""
    return mask.t() if weight.transposed else mask


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + f" and {len(names) - limit} more" * (len(names) > limit)
