"""Masks from and to torch.nn.utils.prune, which keeps them as buffers `weight_mask` beside `weight_orig`."""

from torch import nn
from torch.nn.utils import prune

from sparsity.errors import UserError
from sparsity.masks import Masks
from sparsity.view import PrunableView, bare, module_name

BUFFER = "_mask"  # what the name of a mask ends with, after the parameter's


def from_torch(model: nn.Module) -> Masks:
    """Return the masks of a model that torch.nn.utils.prune has pruned, under the names of its weights.

    UserError where it has none. `prune.remove` makes the weights plain ones again, to which the masks can be applied.
    """
    found = {
        f"{module_name(name)}.{key.removesuffix(BUFFER)}".removeprefix("."): mask.bool()
        for name, module in bare(model).named_modules()
        for key, mask in module._buffers.items()
        if mask is not None and f"{key.removesuffix(BUFFER)}_orig" in module._parameters
    }
    if not found:
        raise UserError("no layer of the model was pruned with torch.nn.utils.prune: there is no weight_mask")
    return Masks(found, {"pruner": "torch.nn.utils.prune"})


def to_torch(masks: Masks, view: PrunableView) -> nn.Module:
    """Give the layers of a model these masks as torch.nn.utils.prune keeps them, in place; returns the model.

    Updated weights are put in first. UserError for masks of another model.
    """
    masks.apply(view)
    for name, mask in masks.items():
        weight = view.weights[name]
        inner, _, key = weight.attribute.rpartition(".")
        for module in weight.modules:
            prune.custom_from_mask(module.get_submodule(inner), key, mask.to(weight.parameter.device))
    return view.model
