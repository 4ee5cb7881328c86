"""Optimizers as the recipes set them up."""

import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.errors import UserError

log = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: Any, precision: str) -> torch.optim.Optimizer:
    """The optimizer that a configuration names: `optimizer` ("adamw" or "muon", which also takes `matrix_lr`), `lr`,
    `weight_decay` and `betas`.
    """
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas}
    if config.optimizer == "muon":
        return muon(model, matrix_lr=config.matrix_lr, **options)
    return adamw(model, fused=precision != "16-mixed", **options)


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: Sequence[float], fused: bool = True
) -> torch.optim.AdamW:
    """AdamW without decay on norms, biases and scalars (every parameter of fewer than two dimensions).

    fused: faster, but Fabric does not clip gradients for it under 16-mixed.
    """
    return _adamw([p for p in model.parameters() if p.requires_grad], lr, weight_decay, betas, fused)


def finetuning_optimizer(model: nn.Module, config: Any, new: Sequence[str], precision: str) -> torch.optim.Optimizer:
    """The optimizer that a task's configuration names, of all that learns in a model: see `optimizer_of`."""
    return optimizer_of([(name, p) for name, p in model.named_parameters() if p.requires_grad], config, new, precision)


def optimizer_of(
    named: Sequence[tuple[str, nn.Parameter]], config: Any, new: Sequence[str], precision: str
) -> torch.optim.Optimizer:
    """The optimizer that a task's configuration names: `opt` ("adamW", "sgd", or one of timm), `lr`,
    `weight_decay` and `betas`.

    named: what learns. new: globs of parameters that learn at lr x `lr_mult`. No decay on norms, biases and scalars.
    Warns where there are none and `lr_mult` asks for another rate.
    """
    groups = []
    if config.lr_mult != 1 and not any(fnmatchcase(name, glob) for name, _ in named for glob in new):
        log.warning("lr_mult %g changes nothing: this model has no newly initialised parameters", config.lr_mult)
    for rate, fresh in ((config.lr, False), (config.lr * config.lr_mult, True)):
        chosen = [p for name, p in named if any(fnmatchcase(name, glob) for glob in new) == fresh]
        groups += [group | {"lr": rate} for group in _by_decay(chosen, config.weight_decay)]
    groups = [group for group in groups if group["params"]]
    if config.opt == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])
    if config.opt != "adamW":
        return _of_timm(groups, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=precision != "16-mixed")


def _of_timm(groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    """Return an optimizer of timm with its own betas; UserError where it has none of this name."""
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, opt=config.opt, lr=config.lr, momentum=config.betas[0])
    except (ValueError, TypeError, AssertionError, KeyError) as error:
        raise UserError(f"--optimizer {config.opt}: {' '.join(str(error).split())}") from error


def muon(
    model: nn.Module, *, lr: float, matrix_lr: float, weight_decay: float, betas: Sequence[float]
) -> "ChainedOptimizer":
    """Muon (K. Jordan et al., 2024) on the matrices of linear layers, AdamW on all else: fewer steps from scratch.

    matrix_lr: peak rate of the matrices. lr: peak rate of embeddings, convolutions, norms and biases.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # with what is tied to them
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tables
    parameters = [p for p in model.parameters() if p.requires_grad]
    return ChainedOptimizer(
        _adamw([p for p in parameters if id(p) not in linears], lr, weight_decay, betas, fused=True),
        torch.optim.Muon([p for p in parameters if id(p) in linears], lr=matrix_lr, weight_decay=weight_decay),
    )


def _adamw(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, betas: Sequence[float], fused: bool
) -> torch.optim.AdamW:
    return torch.optim.AdamW(_by_decay(parameters, weight_decay), lr=lr, betas=tuple(betas), fused=fused)


def _by_decay(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays, and norms, biases and scalars."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def after_each_step(optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> None:
    """Have `call` follow each step of the optimizer: not each batch, nor a step that the loss scale of fp16 skips."""
    stepped = optimizer.optimizers[-1] if isinstance(optimizer, ChainedOptimizer) else optimizer
    stepped.register_step_post_hook(lambda *_: call())


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers on different parameters, stepped as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
