"""Learnable N:M masks on the prunable weights of a view (MaskLLM, arXiv 2409.17481)."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsity.errors import UserError, listed
from sparsity.learned.gates import new_gate
from sparsity.learned.layer import MaskedLayer, Terms, add_prior, checked_pattern, gate_place, masked, masked_kind
from sparsity.masks import Masks
from sparsity.pattern import NM
from sparsity.view import PrunableView, PrunableWeight

logger = logging.getLogger(__name__)


class LearnableMasks:
    """The gates of a model's prunable weights. The model's layers are given them here, and lose them in `detach`.

    names: of the weights that have one; a layer whose inputs M does not divide stays dense, with a warning.
    gate_std, seed: the first gates are N(0, gate_std^2), a function of the seed and the layers.

    Raises UserError where no layer divides into groups of M, or one has a gate already.
    """

    def __init__(self, view: PrunableView, pattern: NM, *, hard: bool = False, gate_std: float = 0.2, seed: int = 0):
        self.view, self.pattern, self.seed = view, checked_pattern(pattern.n, pattern.m), seed
        fitting = {name: weight for name, weight in view.weights.items() if pattern.fits(weight.shape[1])}
        rest = [f"{name} ({weight.shape[1]} inputs)" for name, weight in view.weights.items() if name not in fitting]
        if not fitting:
            raise UserError(f"no layer of this model divides into groups of {pattern.m} inputs: choose another M")
        if rest:
            logger.warning("these layers do not divide into groups of %d and stay dense: %s", pattern.m, listed(rest))
        generator = torch.Generator().manual_seed(seed)
        self.gates: dict[str, nn.Parameter] = {}
        self._weights, self._terms = fitting, Terms()
        for name, weight in fitting.items():
            gate = new_gate(weight.numel // pattern.m, pattern, gate_std, generator)
            self.gates[name] = nn.Parameter(gate.to(**gate_place(weight.parameter)))
            for module in weight.modules:
                self._attach(name, weight, module, hard)

    def _attach(self, name: str, weight: PrunableWeight, module: nn.Module, hard: bool) -> None:
        if weight.attribute != "weight":
            raise UserError(f"layer {name!r} of an nn.MultiheadAttention cannot learn its mask: --exclude it")
        if isinstance(module, MaskedLayer):
            raise UserError(f"layer {name!r} has a learnable mask already")
        calls = weight.transposed or type(module).forward is nn.Linear.forward
        module.__class__ = masked_kind(type(module), calls)
        module = masked(module)
        module.learn_mask(self.gates[name], self.pattern, hard, transposed=weight.transposed)
        module.terms, module.name = self._terms, name

    def layers(self) -> Iterator[tuple[str, MaskedLayer]]:
        """Every layer with the name of its weight, a tied one's several."""
        return ((name, masked(module)) for name, weight in self._weights.items() for module in weight.modules)

    def freeze_weights(self) -> None:
        """Nothing but the gates learns."""
        gates = {id(gate) for gate in self.gates.values()}
        for parameter in self.view.model.parameters():
            parameter.requires_grad_(id(parameter) in gates)

    def start_from(self, prior: Masks, strength: float) -> None:
        """Prefer the candidates that agree with these masks (`add_prior`).

        Raises UserError where they are another model's, or keep more than N of any M.
        """
        resolved = prior.resolve(self.view)
        for name, weight in self._weights.items():
            mask = weight.as_matrix(resolved[name])
            most = int(mask.reshape(-1, self.pattern.m).sum(dim=1).max())
            if most > self.pattern.n:
                raise UserError(
                    f"the prior is not {self.pattern}: it keeps {most} of {self.pattern.m} consecutive weights in "
                    f"{name}; prune with --pattern {self.pattern}"
                )
        for name, weight in self._weights.items():
            mask = weight.as_matrix(resolved[name]).to(weight.parameter.device)
            add_prior(self.gates[name], mask, self.pattern, strength)

    def anneal(self, scaling: float, tau: float) -> None:
        """From the next forward pass on; UserError unless tau is above 0."""
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
                masked(module).key = key

    def squared_weight(self) -> Tensor:
        """Sum over the weights of ||W * sample||^2 in the last training forward, once; W counts as a constant."""
        total = torch.stack(list(self._terms.norms.values())).sum()
        self._terms.norms.clear()
        return total

    def check_gradients(self) -> None:
        """Raise UserError naming a layer whose gate got none: the model reads its weight past the layer's forward."""
        idle = [name for name, gate in self.gates.items() if gate.grad is None]
        if idle:
            raise UserError(
                f"the mask of {listed(idle)} cannot be learned: the loss does not depend on the layer; keep it dense "
                "(--exclude)"
            )

    def masks(self, provenance: Mapping[str, Any] | None = None) -> Masks:
        """Return the masks that the gates prefer: exactly N of every M, and all of the layers that stay dense."""
        found = {
            name: weight.as_stored(masked(weight.modules[0]).mask)
            if name in self.gates
            else torch.ones(weight.parameter.shape, dtype=torch.bool)
            for name, weight in self.view.weights.items()
        }
        return Masks(found, {"pattern": str(self.pattern), **(provenance or {})}, self.view.aliases)

    def detach(self) -> None:
        """The layers as they were, without gates; the weights are not changed."""
        for module in (module for weight in self._weights.values() for module in weight.modules):
            layer = masked(module)
            del layer.gate, layer.setting, layer.key, layer.terms, layer.pattern, layer.hard, layer.transposed
            del layer.folded, layer.name
            module.__class__ = layer.dense_kind
