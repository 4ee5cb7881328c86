"""A view of a prunable model: nothing in the model is replaced, and no state-dict key changes.

The view names the prunable weights (an nn.Linear's, or a transformers Conv1D's), finds tied ones by parameter identity,
and refuses by name what it could only prune wrongly. `canonical` is the one place where the prefixes of wrappers
(compile, Fabric, DDP) are stripped from a name.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsity.errors import UserError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # narrower ones need scales of their own
IN, OUT = "in_proj_weight", "out_proj.weight"  # of nn.MultiheadAttention: (3 d, d) for query, key and value, and (d, d)
_TABLES = ("bias", "pos_embed")  # in names of 3-D parameters that are added, not multiplied
_WRAPPERS = re.compile(r"^(?:module\.)+|(?:^|(?<=\.))(?:_orig_mod\.|_forward_module\.)(?:module\.)*")


def canonical(key: str) -> str:
    """The state-dict key without what torch.compile, Fabric and DDP put in front of it."""
    return _WRAPPERS.sub("", key)


# Classes that wrap a model, by name, so that none of their packages is imported -> the children that are the model, the
# innermost first: Fabric keeps what the strategy has wrapped beside it.
_WRAPPED = {
    "OptimizedModule": ("_orig_mod",),
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "_FabricModule": ("_original_module", "_forward_module"),
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
}


def bare(model: nn.Module) -> nn.Module:
    """The model without what torch.compile, DataParallel, DDP, Fabric and FSDP have put around it."""
    while True:
        children = _WRAPPED.get(type(model).__name__, ())
        inner = next((model._modules[name] for name in children if model._modules.get(name) is not None), None)
        if inner is None:
            return model
        model = inner


def eager(model: nn.Module) -> AbstractContextManager:
    """Modules of the model that are compiled run as they were written: hooks that are traced do not see tensors."""
    compiled = any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def accelerators(like: Tensor) -> list[torch.device]:
    """Return the devices beside the CPU whose random numbers a computation with this tensor draws: its own, or none."""
    return [like.device] if like.is_cuda else []


def module_name(raw: str) -> str:
    """The name of a module without what wrappers put into it."""
    return canonical(f"{raw}.").removesuffix(".")


@dataclass(frozen=True, eq=False)
class Output:
    """An output of a model for a batch of B samples, which another model is taught to match.

    kind: what of it (B, ..., width) is compared: of "logits" the softmax, of an "embedding" the direction, of "states"
    the numbers. real: bool, the shape of `tensor` without its last axis, false at padding; None: all is real.
    """

    kind: Literal["logits", "embedding", "states"]
    tensor: Tensor
    real: Tensor | None = None


Outputs = Mapping[str, Output]


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """One prunable parameter, under every name that it has."""

    name: str  # canonical state-dict key, "....weight"
    aliases: tuple[str, ...]  # every state-dict key of the same parameter, canonical first (tied weights)
    modules: tuple[nn.Module, ...]  # the layers that use it, in the model's order
    uses: tuple[str, ...]  # for each of `modules`, the state-dict key of its weight
    group: str  # modality: "vision", "text", "fusion"
    transposed: bool = False  # transformers' Conv1D stores (in, out)
    attribute: str = "weight"  # of `modules`; of nn.MultiheadAttention, IN or OUT

    @property
    def parameter(self) -> nn.Parameter:
        inner, _, key = self.attribute.rpartition(".")
        weight = self.modules[0].get_submodule(inner)._parameters[key]  # as stored: a learned mask changes the reading
        assert weight is not None, "layers without a weight of their own are refused"
        return weight

    @property
    def shape(self) -> torch.Size:
        """(out, in), whichever way it is stored."""
        return self.matrix().shape

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        """State-dict key -> bias of each layer that uses the weight; empty unless all of them have one."""
        found = [module._parameters.get("bias") for module in self.modules]
        keys = [f"{use.removesuffix('weight')}bias" for use in self.uses]
        known = {key: bias for key, bias in zip(keys, found, strict=True) if bias is not None}
        return known if len(known) == len(found) else {}

    def matrix(self) -> Tensor:
        """The weight as (out, in), without gradient, on the parameter's own storage."""
        return self.as_matrix(self.parameter.detach())

    def as_matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the parameter's own layout, such as a mask or a gradient, as (out, in)."""
        return stored.t() if self.transposed else stored

    def as_stored(self, matrix: Tensor) -> Tensor:
        """An (out, in) tensor, such as a mask, in the parameter's own layout."""
        return matrix.t().contiguous() if self.transposed else matrix


class PrunableView:
    """The prunable weights of a model, and how to run it.

    group_of: state-dict key -> modality group. keep_dense: globs over module names; a module that matches stays dense
    with all that is in it. forward(batch): runs one calibration batch. loss(batch) -> scalar. valid_tokens(key, batch):
    (samples, tokens), true where a token of the input of the layer whose weight has that key is real, or None when all
    are; a tied weight is asked about once for each layer that uses it. blocks: the model's blocks in execution order,
    for layer-wise methods. in_full(batch): runs a calibration batch in every mode in which the model is evaluated, for
    what fits weights to their inputs, where `forward` runs fewer. outputs(model, batch): name -> what the model, this
    one or a copy of it, gives for a batch and is taught to give when it is pruned. moved_by_loss: globs over the names
    of the parameters that the loss itself changes (momentum copies). halves: state-dict key -> dtype of tensors that
    the model's source has in half precision, while they are wider here: what is written goes back to it. Raises
    UserError, naming the layer, for weights that cannot be pruned as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        group_of: Callable[[str], str],
        keep_dense: Sequence[str] = (),
        forward: Callable[[Any], Any] | None = None,
        in_full: Callable[[Any], Any] | None = None,
        loss: Callable[[Any, torch.Generator | None], Tensor] | None = None,
        valid_tokens: Callable[[str, Any], Tensor | None] | None = None,
        blocks: Sequence[nn.Module] | None = None,
        outputs: Callable[[nn.Module, Any], Outputs] | None = None,
        moved_by_loss: Sequence[str] = (),
        halves: Mapping[str, torch.dtype] | None = None,
    ):
        model = bare(model)
        self.model, self.halves = model, dict(halves or {})
        self.moved_by_loss = frozenset(
            id(p) for n, p in model.named_parameters() if any(fnmatchcase(canonical(n), g) for g in moved_by_loss)
        )
        self.blocks = blocks
        self._forward, self._loss, self._valid_tokens, self._outputs = forward, loss, valid_tokens, outputs
        self._in_full, self.has_outputs = in_full, outputs is not None
        self.weights, self.dense = _discover(model, group_of, tuple(keep_dense))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> names of its weights, both in prunable order."""
        return members({weight.name: weight.group for weight in self.weights.values()})

    def without(self, groups: Sequence[str]) -> "PrunableView":
        """Return a view of the same model where these groups stay dense. UserError for a group that it does not have,
        and where no weight would be left.
        """
        if unknown := [group for group in groups if group not in self.groups]:
            raise UserError(f"there is no group {unknown[0]!r} to keep dense; there are: {', '.join(self.groups)}")
        left = copy.copy(self)
        left.weights = {name: weight for name, weight in self.weights.items() if weight.group not in groups}
        if not left.weights:
            raise UserError(f"all groups are to be kept dense ({', '.join(groups)}): nothing would be pruned")
        gone = [key for weight in self.weights.values() if weight.group in groups for key in weight.aliases]
        left.dense = (*self.dense, *gone)
        return left

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Name -> every state-dict key of that weight."""
        return {name: weight.aliases for name, weight in self.weights.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return state-dict key -> parameter of the model, under every name that it has."""
        return {canonical(key): parameter for key, parameter in self.model.named_parameters(remove_duplicate=False)}

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights.values())

    @property
    def accelerators(self) -> list[torch.device]:
        """Return `accelerators` of the weights."""
        return accelerators(next(iter(self.weights.values())).parameter)

    @property
    def device(self) -> torch.device:
        """Return the device of the first weight: where ranks add up, and what is computed lies."""
        return next(iter(self.weights.values())).parameter.device

    def forward(self, batch: Any) -> Any:
        if self._forward is None:
            raise UserError("this pruner needs calibration data, and the model's view has no forward to run it")
        with eager(self.model):
            return self._forward(batch)

    def in_full(self) -> "PrunableView":
        """Return the same view, whose forward runs every mode in which the model is evaluated."""
        view = copy.copy(self)
        view._forward = self._in_full or self._forward
        return view

    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """The scalar loss of a batch; what it draws (hard negatives) comes from `generator`."""
        if self._loss is None:
            raise UserError("this pruner needs gradients, and the model's view has no loss")
        with eager(self.model):
            return self._loss(batch, generator)

    def outputs(self, batch: Any, model: nn.Module | None = None) -> Outputs:
        """Return what the model gives for a batch; of a copy of it where `model` is one."""
        if self._outputs is None:
            raise UserError("recovery needs what the model gives for a batch, and the model's view has no outputs")
        return self._outputs(self.model if model is None else model, batch)

    def valid_tokens(self, key: str, batch: Any) -> Tensor | None:
        return None if self._valid_tokens is None else self._valid_tokens(key, batch)


@dataclass
class _Found:
    """One parameter while the model is walked through."""

    aliases: list[str]
    modules: list[nn.Module]
    uses: list[str]
    transposed: bool
    attribute: str = "weight"


def _discover(
    model: nn.Module, group_of: Callable[[str], str], keep_dense: tuple[str, ...]
) -> tuple[dict[str, PrunableWeight], tuple[str, ...]]:
    """The weights in the model's own module order, and the keys of the linear layers that stay dense."""
    found: dict[int, _Found] = {}
    fixed: set[int] = set()  # parameters that something not prunable uses
    dense: list[str] = []
    attended: set[int] = set()  # output projections of nn.MultiheadAttention, which it does not call
    walked = list(_walk(model, keep_dense))
    left = {id(module) for _, module, kept_dense in walked if kept_dense}
    for name, module, kept_dense in walked:
        if not kept_dense:
            _refuse_experts(name, module)
        if _is_attention(module) and not kept_dense:
            _add_attention(name, module, found, id(module.out_proj) not in left)
            attended.add(id(module.out_proj))
            continue
        if id(module) in attended and not kept_dense:
            continue
        linear = isinstance(module, nn.Linear) or _is_conv1d(module)
        if kept_dense or not linear:
            if not kept_dense:
                _refuse_opaque(name, module)
            fixed.update(id(p) for p in module._parameters.values() if p is not None)
            if linear:
                dense.append(f"{name}.weight")
            continue
        weight = _plain_weight(name, module)
        entry = found.setdefault(id(weight), _Found([], [], [], not isinstance(module, nn.Linear)))
        entry.aliases.append(f"{name}.weight")
        if not any(module is known for known in entry.modules):
            entry.modules.append(module)
            entry.uses.append(f"{name}.weight")
    weights: dict[str, PrunableWeight] = {}
    for key, entry in found.items():
        if key in fixed:  # tied to an embedding or to a layer kept dense
            dense.extend(entry.aliases)
            continue
        name = entry.aliases[0]
        if name in weights:
            raise UserError(f"two layers have the weight name {name!r} once wrapper prefixes are stripped")
        uses = tuple(entry.aliases), tuple(entry.modules), tuple(entry.uses)
        weights[name] = PrunableWeight(name, *uses, group_of(name), entry.transposed, entry.attribute)
    if not weights:
        raise UserError("the model has no prunable weight (an nn.Linear that is not kept dense)")
    return weights, tuple(dense)


def _is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether this is one whose queries, keys and values are made by one matrix: it calls no layer."""
    return isinstance(module, nn.MultiheadAttention) and module._parameters.get(IN) is not None


def _add_attention(name: str, module: nn.MultiheadAttention, found: dict[int, _Found], out: bool) -> None:
    """Note the weights of an nn.MultiheadAttention. out: whether its output projection is prunable."""
    for attribute in (IN, OUT) if out else (IN,):
        inner, _, key = attribute.rpartition(".")
        weight = _plain(f"{name}.{attribute}", module.get_submodule(inner), key)
        entry = found.setdefault(id(weight), _Found([], [], [], False, attribute))
        entry.aliases.append(f"{name}.{attribute}")
        if not any(module is known for known in entry.modules):
            entry.modules.append(module)
            entry.uses.append(f"{name}.{attribute}")


def _walk(model: nn.Module, keep_dense: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, bool]]:
    """(canonical name, module, whether it is kept dense), under every name of each module."""
    dense_roots: list[str] = []
    for raw, module in model.named_modules(remove_duplicate=False):
        name = module_name(raw)
        inside = any(name.startswith(root + ".") for root in dense_roots)
        matches = any(fnmatchcase(name, glob) for glob in keep_dense)
        if matches or isinstance(module, nn.modules.conv._ConvNd):  # what is inside of one (weight norm) is its own
            dense_roots.append(name)
        yield name, module, inside or matches


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores (in, out); told by its name, since transformers is not imported
    here.
    """
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def _plain_weight(name: str, module: nn.Module) -> nn.Parameter:
    """The layer's weight, when it is a plain floating-point matrix."""
    weight = _plain(name, module, "weight")
    if isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features):
        raise _refusal(name, f"its weight has shape {tuple(weight.shape)}, which is not (out, in)")
    return weight


def _plain(name: str, module: nn.Module, key: str) -> nn.Parameter:
    """A parameter of a module, when it is a plain floating-point tensor."""
    if parametrize.is_parametrized(module, key):
        raise _refusal(name, "its weight is parametrised")
    weight = module._parameters.get(key)
    if weight is None:
        raise _refusal(name, "its weight is computed from others (weight norm, spectral norm, torch.nn.utils.prune)")
    if isinstance(weight, nn.UninitializedParameter):
        raise _refusal(name, "its weight has no shape before a first forward")
    if weight.dtype not in FLOATS or type(weight.data) is not Tensor:
        raise _refusal(name, f"its weight is quantised or sharded ({type(weight.data).__name__}, {weight.dtype})")
    return weight


def _refuse_opaque(name: str, module: nn.Module) -> None:
    """Layers that hold linear weights where no hook sees their input."""
    if isinstance(module, nn.MultiheadAttention):
        raise _refusal(name, "an nn.MultiheadAttention whose keys or values have a width of their own")
    kind = type(module)
    if "quantized" in kind.__module__ and "Linear" in kind.__name__:
        raise _refusal(name, f"it is quantised ({kind.__module__}.{kind.__name__})")


def _refuse_experts(name: str, module: nn.Module) -> None:
    """3-D weights (experts, nn.Bilinear); embeddings of positions, biases by position and convolutions are none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return
    for key, parameter in module._parameters.items():
        table = any(word in key for word in _TABLES)
        if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1 and not table:
            raise _refusal(name, f"its {key} is 3-D, {tuple(parameter.shape)}")


def _refusal(name: str, why: str) -> UserError:
    layer = name or "the model itself"
    way_out = f"keep it dense (keep_dense, on the command line --exclude {name!r}) to prune the others"
    return UserError(f"layer {layer!r} cannot be pruned: {why}; {way_out}")


def members(groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Return group -> its names, from name -> group, keeping the order."""
    result: dict[str, list[str]] = {}
    for name, group in groups.items():
        result.setdefault(group, []).append(name)
    return result
