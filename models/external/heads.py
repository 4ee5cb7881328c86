"""Output heads by kind: the last linear layer on the way to each output, with the layers that are one MLP with it.

An image model of transformers is run once on an empty image, and the graph of each output is walked back to the first
linear layers; what detectors and segmenters put out of several places (each decoder layer's boxes, the encoder's
proposals) is found whatever it is called.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.statistics.inputs import untouched
from sparsity.view import accelerators

log = logging.getLogger(__name__)

SIDE = 128  # of the empty image in pixels, where the configuration has none: two by two at a stride of 64
WORDS = 8  # of the empty text, for detectors that are told what to look for
# Fields that are predictions; others (hidden states, attentions) come from the trunk.
PREDICTIONS = ("logits", "box", "mask", "score", "class", "keypoint", "depth", "iou", "alphas", "segmentation", "coord")
# Where the walk ends without a linear layer: what lies behind these is the trunk. A convolution is a head by itself.
TRUNK = (
    "LayerNorm",
    "BatchNorm",
    "GroupNorm",
    "RmsNorm",
    "Softmax",
    "ScaledDotProduct",
    "Convolution",
    "Embedding",
)
LINEAR = ("AddmmBackward", "MmBackward", "LinearBackward")


def heads_by_kind(model: nn.Module) -> set[str]:
    """Names of the modules that make what an image model of transformers predicts; none where it cannot be run so."""
    layers = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        found = {name for output in _predictions(model) for name in _last_linear(output, layers)}
    except Exception as error:  # a model that needs more than an image
        log.debug("%s cannot be run on an image alone: %s", type(model).__name__, error)
        return set()
    names = dict(model.named_modules())
    return {_whole(name, names) for name in found}


def _predictions(model: nn.Module) -> list[Tensor]:
    """Return what the model predicts for an empty image, with its graph."""
    first = next(model.parameters())
    batch = {"pixel_values": torch.zeros(1, *_size(model.config), device=first.device, dtype=first.dtype)}
    if "input_ids" in inspect.signature(model.forward).parameters:
        batch["input_ids"] = torch.ones(1, WORDS, device=first.device, dtype=torch.long)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with untouched(model), torch.random.fork_rng(accelerators(first)), torch.enable_grad():
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            output = model(**batch)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return [tensor for name, tensor in _named(output) if any(part in name for part in PREDICTIONS)]


def _size(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images of a configuration."""
    known = config.to_dict()
    parts = (known, *(known.get(part) or {} for part in ("backbone_config", "vision_config")))
    side, channels = (
        next((part[key] for part in parts if part.get(key)), None) for key in ("image_size", "num_channels")
    )
    height, width = side if isinstance(side, list | tuple) else (side or SIDE, side or SIDE)
    return channels if isinstance(channels, int) else 3, height, width


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, under the names of all the fields that lead there."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        yield from (found for key, each in value.items() for found in _named(each, f"{name}.{key}"))
    elif isinstance(value, list | tuple):
        yield from (found for each in value for found in _named(each, name))


def _last_linear(output: Tensor, layers: Mapping[int, str]) -> set[str]:
    """Names of the linear layers that are met first on every way back from an output."""
    found: set[str] = set()
    seen: set[Any] = set()
    open_ends = [output.grad_fn]
    while open_ends:
        node = open_ends.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        own = {layers[weight] for weight in _parameters(node) if weight in layers} if kind.startswith(LINEAR) else set()
        found |= own  # a product without one is that of two activations: masks are queries times pixels
        if not own and not any(part in kind for part in TRUNK):
            open_ends += [following for following, _ in node.next_functions]
    return found


def _parameters(node: Any) -> Iterator[int]:
    """ids of the parameters that a product has as they are, or transposed."""
    for following, _ in node.next_functions:
        while following is not None and type(following).__name__ in ("TBackward0", "TransposeBackward0"):
            following = following.next_functions[0][0]
        if type(following).__name__ == "AccumulateGrad":
            yield id(following.variable)


def _whole(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the outermost module around a layer that has linear layers alone: a head of several."""
    while "." in name:
        outer = name.rpartition(".")[0]
        if not _linear_alone(modules[outer]):
            return name
        name = outer
    return name


def _linear_alone(module: nn.Module) -> bool:
    """Whether all that has weights or buffers in a module is a linear layer."""
    return all(isinstance(each, nn.Linear) for each in module.modules() if each._parameters or each._buffers)
