"""Checkpoints with gates or masks beside the weights, folded into those of the dense model."""

from collections.abc import Mapping
from functools import partial
from math import comb
from typing import Any

from torch import Tensor

from sparsity.bits import MadeTensors, Recipe, recipes_of
from sparsity.errors import UserError
from sparsity.learned.gates import choose
from sparsity.pattern import NM

GATE, MASK = ".gate", ".mask"
_NESTED = ".diff_mask"  # where the public code for language models has gate and candidates
_STATE = ("state_dict", "state_dict_ema", "model", "module")  # under which a checkpoint holds its tensors


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

    Raises UserError, naming the layer, for shapes that do not fit.
    """
    return dict(folding(state_dict, N, M))


def folding(state_dict: Mapping[str, Any], N: int | None = None, M: int | None = None) -> MadeTensors:
    """Return what `fold` does, each tensor made when it is asked for, when it is seen whether its mask fits."""
    recipes = _recipes(state_dict)
    state = MadeTensors(recipes)
    layers = {key.removesuffix(kind): None for kind in (GATE, MASK) for key in state if key.endswith(kind)}
    layers = dict.fromkeys(layer.removesuffix(_NESTED) for layer in layers)
    extra = tuple(f"{layer}{nested}." for layer in layers for nested in ("", _NESTED))
    beside = ("gate", "mask", "mask_options", "_mask_options", "_extra_state")
    dropped = {prefix + name for prefix in extra for name in beside}
    result = {key: recipe for key, recipe in recipes.items() if key not in dropped}

    def masked(layer: str) -> Tensor:
        weight = state[f"{layer}.weight"]
        return weight * _mask_of(state, layer, weight, N, M).to(weight.device)

    for layer in layers:
        key = f"{layer}.weight"
        if key not in recipes:
            raise UserError(f"the checkpoint has a mask of {layer!r}, but no {key}")
        result[key] = Recipe(recipes[key].dtype, recipes[key].shape, partial(masked, layer))
    return MadeTensors(result)


def _mask_of(state: Mapping[str, Tensor], layer: str, weight: Tensor, n: int | None, m: int | None) -> Tensor:
    """The mask (out, in) that a checkpoint has of a layer."""

    def found(*names: str) -> Tensor | None:
        return next((state[key] for name in names if (key := f"{layer}{name}") in state), None)

    gate, mask = found(GATE, _NESTED + GATE), found(MASK)
    if mask is not None and mask.shape != weight.shape:
        raise UserError(f"{layer}.mask has the shape {tuple(mask.shape)}, and its weight {tuple(weight.shape)}")
    if gate is None:
        return mask != 0
    if gate.ndim != 2 or weight.numel() % len(gate) or (m and weight.numel() != m * len(gate)):
        raise UserError(f"{layer}.gate of the shape {tuple(gate.shape)} does not fit a weight {tuple(weight.shape)}")
    size = weight.numel() // len(gate)
    if weight.shape[1] % size:
        raise UserError(f"the groups of {size} weights of {layer}.gate straddle the rows of {tuple(weight.shape)}")
    options = found(".mask_options", "._mask_options", f"{_NESTED}.mask_options")
    if options is not None:
        return options.reshape(-1, size).bool()[gate.argmax(dim=1)].view(weight.shape)
    fitting = [kept for kept in range(1, size) if comb(size, kept) == gate.shape[1] and n in (None, kept)]
    if len(fitting) > 1 and mask is not None and not mask.all():
        fitting = [kept for kept in fitting if kept * len(gate) == int(mask.count_nonzero())]
    if len(fitting) != 1:
        known = " or ".join(f"{kept}:{size}" for kept in fitting) or f"no N of {size}"
        raise UserError(f"{layer}.gate has {gate.shape[1]} candidates, which is {known}: say which N and M it is")
    return choose(gate, NM(fitting[0], size)).view(weight.shape)


def _recipes(state: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return those of the innermost mapping of names to tensors, without what wrappers put in front of every name."""
    while not isinstance(state, MadeTensors) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in _STATE if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            raise UserError("the checkpoint holds no tensors; expected a state dict, bare or under 'state_dict'")
        state = inner
    own = state if isinstance(state, MadeTensors) else {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return {key.removeprefix("module."): recipe for key, recipe in recipes_of(own).items()}
