"""The quick start of learnable masks, under the names of the public code:

import sparsity
model = sparsity.utils.replace_linear_with_(model, sparsity.maskllm.MaskedLinear, exclude=[model.head], N=2, M=4)
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from sparsity.errors import UserError
from sparsity.learned.layer import MaskedLinear

logger = logging.getLogger(__name__)


def replace_linear_with_(
    model: nn.Module, kind: type[nn.Linear], exclude: Iterable[nn.Module] = (), **options: Any
) -> nn.Module:
    """Every nn.Linear of a model becomes a `kind`, in place, but for the modules in `exclude` and what is in them.

    kind: a class of sparsity.maskllm, or any that is made like nn.Linear; options: further arguments of it. Weights,
    `training` and `requires_grad` stay; tied weights stay tied, and share their gate. A layer whose inputs M does not
    divide stays as it is, with a warning. Returns the model, or what has taken its place where it is a layer itself.

    Raises UserError naming nn.MultiheadAttention, whose projections are not called as layers.
    """
    kept = {id(inner) for module in exclude for inner in module.modules()}
    made: dict[int, nn.Module] = {}  # by layer, which may have several names
    gates: dict[int, nn.Parameter] = {}  # by weight
    left: list[str] = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in kept or isinstance(module, kind):
            continue
        if isinstance(module, nn.MultiheadAttention):
            raise UserError(f"{name}: nn.MultiheadAttention does not call its projections as layers; put it in exclude")
        if not isinstance(module, nn.Linear):
            continue
        size = options.get("M", 4)
        if issubclass(kind, MaskedLinear) and module.in_features % size:
            left.append(f"{name} ({module.in_features} inputs)")
            continue
        if id(module) not in made:
            made[id(module)] = _made(module, kind, options, gates)
        if not name:
            return made[id(module)]
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[id(module)])
    if left:
        logger.warning("these layers do not divide into groups of %d and stay dense: %s", size, ", ".join(left))
    return model


def _made(
    layer: nn.Linear, kind: type[nn.Linear], options: dict[str, Any], gates: dict[int, nn.Parameter]
) -> nn.Linear:
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    new = kind(layer.in_features, layer.out_features, layer.bias is not None, **options, **place)
    new.weight, new.bias = layer.weight, layer.bias
    if isinstance(new, MaskedLinear):
        new.gate = gates.setdefault(id(layer.weight), new.gate)
    return new.train(layer.training)
