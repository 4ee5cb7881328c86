"""The blocks of a stage by themselves: what they put out for each captured batch, what the dense model's put out there,
and which parameters nothing else uses, so that they can be trained.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsity.errors import listed
from sparsity.replay.capture import Calls, State
from sparsity.replay.store import Store
from sparsity.replay.trace import Trace
from sparsity.view import PrunableView

logger = logging.getLogger(__name__)

ATTENTION, MLP, BLOCK = "attention", "mlp", "block"  # which layers of a block train
_NAMED = "att"  # in the path of a layer of attention within its block: attn, attention, self_attn, SelfAttention


@dataclass(frozen=True)
class Use:
    """The calls of a block in one calibration batch.

    run: returns the outputs that other code or blocks read, (samples, ..., width) each, of the model as it is. wanted:
    returns those of the dense model on its own inputs. real: for each output which of its rows are no padding, bool
    (samples, ...), or None where all are. shapes: of the outputs.
    """

    run: Callable[[], list[Tensor]]
    wanted: Callable[[], list[Tensor]]
    real: list[Tensor | None]
    shapes: list[torch.Size]


class Uses(NamedTuple):
    """parameters: state-dict key -> what is trained of a block. uses: of this rank's batches, in their order."""

    parameters: dict[str, nn.Parameter]
    uses: list[Use]


NO_USES = Uses({}, [])


def own_calls(found: Trace, stages: Mapping[str, int], stage: int) -> list[int]:
    """Return the calls of blocks whose last weight is pruned in this stage. stages: name of a weight -> its stage."""
    of_blocks = ((number, call) for number, call in enumerate(found.calls) if call.weights and not call.alone)
    return [number for number, call in of_blocks if max(stages[name] for name in call.weights) == stage]


def trainable(
    view: PrunableView, found: Trace, own: Collection[int], names: Collection[str], window: str
) -> dict[str, nn.Parameter]:
    """Return state-dict key -> parameter: what trains of the blocks of these calls.

    That are the prunable weights of `names` in the window with the biases of their layers, and all norms and scales
    (other parameters of one dimension). What is used anywhere else, too, is left out.
    """
    blocks = {found.calls[number].module: None for number in own}
    inside = {module for block in blocks for module in block.modules()}
    elsewhere = {m for n, call in enumerate(found.calls) if n not in own for m in call.module.modules()}
    outer = [module for module in view.model.modules() if module not in inside or module in elsewhere]
    shared = {id(parameter) for module in outer for parameter in module._parameters.values()}
    prunable = {id(view.weights[name].parameter): name for name in names}
    others = {id(weight.parameter) for weight in view.weights.values()} - prunable.keys()
    chosen = {id(p): p for block in blocks for p in _in_window(block, prunable.keys(), others, window)}
    shared |= {id(view.weights[name].parameter) for name in found.between}
    if left := [name for key, name in prunable.items() if key in chosen and key in shared]:
        logger.info("block steps leave out weights that are used outside the block, too: %s", listed(left))
    keys: dict[int, str] = {}
    for key, parameter in view.parameters.items():
        keys.setdefault(id(parameter), key)
    return {prunable.get(key, keys[key]): p for key, p in chosen.items() if key not in shared}


def _in_window(
    block: nn.Module, prunable: Collection[int], others: Collection[int], window: str
) -> Iterator[nn.Parameter]:
    """Parameters of the layers in the window, and of what is no layer. others: ids of weights of other stages."""
    named = [(key.rpartition(".")[0], p) for key, p in block.named_parameters(remove_duplicate=False)]
    layers, foreign = ({path for path, p in named if id(p) in ids} for ids in (prunable, others))
    for path, parameter in named:
        part = ATTENTION if _NAMED in path.lower() else MLP
        vector = parameter.ndim <= 1 and parameter.is_floating_point()
        inside = path not in foreign and (path not in layers or window in (part, BLOCK))
        if inside and (id(parameter) in prunable or vector):
            yield parameter


def use_of(
    view: PrunableView,
    found: Trace,
    own: Sequence[int],
    store: Store,
    pruned: tuple[Calls, State],
    dense: tuple[Calls, State],
) -> Use:
    """Return the calls of one batch. pruned, dense: what runs them in either model, and the batch as it has it."""
    (calls, state), (others, other) = pruned, dense
    read = found.read | {source for call in found.calls for source in call.sources}
    kept = {o: k for o, k in others.kept(other, own).items() if o in read and len(k.size) > 1}
    kept = {output: tensor for output, tensor in kept.items() if tensor.dtype.is_floating_point}
    inside = {module for number in own for module in found.calls[number].module.modules()}
    uses = [use for w in view.weights.values() for use in zip(w.modules, w.uses, strict=True)]
    tokens = [state.tokens[key] for module, key in uses if module in inside]

    def run() -> list[Tensor]:
        outputs = calls.outputs(state, own)
        return [outputs[output] for output in kept]

    def real(shape: torch.Size) -> Tensor | None:
        return next((valid.bool() for valid in tokens if valid is not None and valid.shape == shape[:-1]), None)

    shapes = [tensor.size for tensor in kept.values()]
    return Use(run, lambda: [store.get(tensor) for tensor in kept.values()], list(map(real, shapes)), shapes)


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Autocast casts parameters anew in each forward pass: they change between two."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
