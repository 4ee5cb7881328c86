"""One traced forward pass: which blocks are called in which order, and where each output goes.

Registration order says neither: a decoder may be registered before its encoder, and a projector lies between towers.
What the trace cannot explain (a block that reads what another one keeps for itself, that changes its arguments in
place, that takes objects other than tensors) makes the model unfit for replay, with a reason that is logged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from sparsity.view import PrunableView, module_name

Output = tuple[int, int]  # number of a call in a forward pass, and which leaf of its output
Forward = Callable[..., Any]
Handler = Callable[[nn.Module, Forward, tuple, dict], Any]  # (module, its forward, args, kwargs) -> output

PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, type, torch.dtype, torch.device, torch.Size)
_BETWEEN = -1  # in place of a call: the code between calls of blocks


class UnfitError(Exception):
    """The model cannot be calibrated by replay; the message says why."""


@dataclass
class Call:
    """A call of a block in the traced forward pass.

    weights: names of the prunable weights that it uses. sources: outputs of earlier calls among its arguments. passes:
    for each leaf of its output, the leaf of its arguments with the same shape, strides, dtype and device, which stands
    in for it while the block is a stub (-1: the leaf is None); None where there is not one for each leaf. structure: of
    its output. draws: whether it draws random numbers. alone: it is a single layer, outside of blocks.
    """

    name: str
    module: nn.Module
    weights: set[str]
    sources: list[Output] = field(default_factory=list)
    passes: list[int] | None = None
    structure: Any = None
    draws: bool = False
    alone: bool = False


@dataclass
class Trace:
    """The calls of blocks in the first batch.

    read: outputs of calls that other code than blocks reads. between: names of the weights that such code reads without
    a call of their layer. unfit: why the model cannot be replayed, or None.
    """

    calls: list[Call] = field(default_factory=list)
    read: set[Output] = field(default_factory=set)
    between: set[str] = field(default_factory=set)
    unfit: str | None = None

    def first_use(self, name: str) -> int | None:
        """Return the number of the first call that uses a weight; None where no call does."""
        return next((number for number, call in enumerate(self.calls) if name in call.weights), None)

    def describe(self) -> str:
        """Return the calls in order; "->" where a block takes what the one before it returned, ";" elsewhere."""
        text = ""
        for number, call in enumerate(self.calls):
            follows = any(source == number - 1 for source, _ in call.sources)
            text += (" -> " if follows else "; " if number else "") + call.name
        return text


def units(view: PrunableView) -> dict[nn.Module, str]:
    """Return the modules that are called and replayed as one, with their names.

    They are the view's blocks (of nested ones the innermost; of lists, which are not called, their members), and the
    layers of all prunable weights, for calls outside of blocks.
    """
    layers = {module for weight in view.weights.values() for module in weight.modules}
    blocks = {module for block in view.blocks or () for module in _called(block)}
    blocks = {block for block in blocks if not layers.isdisjoint(block.modules())}
    inner = {b for b in blocks if not any(other in blocks for other in b.modules() if other is not b)}
    return {module: module_name(name) for name, module in view.model.named_modules() if module in inner | layers}


def _called(block: nn.Module) -> Iterator[nn.Module]:
    if isinstance(block, nn.ModuleList | nn.ModuleDict):
        for child in block.children():
            yield from _called(child)
    else:
        yield block


def weights_of(view: PrunableView, module: nn.Module) -> set[str]:
    """Return the names of the prunable weights of a module and what is in it."""
    inside = set(module.modules())
    return {name for name, weight in view.weights.items() if not inside.isdisjoint(weight.modules)}


@contextmanager
def intercepted(modules: Iterable[nn.Module], handler: Handler) -> Iterator[None]:
    """Calls of the modules go to the handler, but for those within such a call; afterwards to their own forward."""
    active = False

    def call(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        nonlocal active
        if active:
            return forward(*args, **kwargs)
        active = True
        try:
            return handler(module, forward, args, kwargs)
        finally:
            active = False

    before: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = wraps(module.forward)(partial(call, module, module.forward))
        yield
    finally:
        for module, own in before:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def random_states(view: PrunableView) -> list[Tensor]:
    """Return the states of the global generators of the CPU and of the model's accelerator."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in view.accelerators)]


def trace(view: PrunableView, batch: Any) -> Trace:
    """Return what one forward pass over a batch shows. The model must be in eval(), without gradients."""
    found = _traced(view, batch)
    # What the model makes once and keeps (rotary tables) looks like a secret between blocks in the first pass only.
    return _traced(view, batch) if found.unfit else found


def _traced(view: PrunableView, batch: Any) -> Trace:
    modules = units(view)
    tracer = _Tracer(view, modules)
    tracer.made(tree_leaves(batch))
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a weight that was cast before is not seen to be read
    try:
        with intercepted(modules, tracer.call), tracer:
            view.forward(batch)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return tracer.trace


class _Tracer(TorchDispatchMode):
    """Follows each storage from the call that made it to the calls that read it."""

    def __init__(self, view: PrunableView, modules: Mapping[nn.Module, str]):
        super().__init__()
        self.trace = Trace()
        self._view, self._names = view, modules
        self._weights = {_storage(weight.parameter): name for name, weight in view.weights.items()}
        self._current = _BETWEEN
        self._arguments: set[int] = set()  # storages of the arguments of the current call
        self._makers: dict[int, int] = {}  # storage -> call
        self._alive: list[StorageWeakRef] = []  # so that no other storage takes the place of one of them
        self._outputs: dict[int, Output] = {}  # storage -> the last output that lies in it
        self._returned: dict[int, tuple[Output, Tensor, int]] = {}  # id of a tensor -> output, tensor, version

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors((args, kwargs)):
            self._reads(_storage(tensor))
        self.made(tree_leaves(result))
        return result

    def made(self, leaves: Sequence[Any]) -> None:
        """Note who made these tensors, as far as their storage is new."""
        for tensor in tensors(leaves):
            storage = _storage(tensor)
            if storage not in self._makers and storage not in self._weights:
                self._makers[storage] = self._current
                self._alive.append(StorageWeakRef(tensor.untyped_storage()))

    def _reads(self, storage: int) -> None:
        if storage in self._weights:
            name = self._weights[storage]
            (self.trace.between if self._current == _BETWEEN else self.trace.calls[-1].weights).add(name)
            return
        maker = self._makers.get(storage, self._current)  # without a maker it was there before
        if maker == self._current or storage in self._arguments:
            return
        if self._current == _BETWEEN and storage in self._outputs:
            self.trace.read.add(self._outputs[storage])
            return
        reader = "other code" if self._current == _BETWEEN else f"block {self.trace.calls[-1].name!r}"
        owner = "other code" if maker == _BETWEEN else f"block {self.trace.calls[maker].name!r}"
        self._refuse(f"{reader} reads a tensor of {owner} that is not among its arguments")

    def call(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Run a block, and note its arguments and its output."""
        number, name = len(self.trace.calls), self._names[module]
        alone = any(module in weight.modules for weight in self._view.weights.values())
        call = Call(name, module, weights_of(self._view, module), alone=alone)
        self.trace.calls.append(call)
        leaves = tree_leaves((args, kwargs))
        self._check(leaves, name)
        for tensor in tensors(leaves):
            output, _, version = self._returned.get(id(tensor), (None, None, -1))
            if output is not None and version == tensor._version:
                call.sources.append(output)
        versions, states = [tensor._version for tensor in tensors(leaves)], random_states(self._view)
        self._current, self._arguments = number, {_storage(tensor) for tensor in tensors(leaves)}
        result = forward(*args, **kwargs)
        self._current, self._arguments = _BETWEEN, set()
        if versions != [tensor._version for tensor in tensors(leaves)]:
            self._refuse(f"block {name!r} changes its arguments in place")
        call.draws = any(not torch.equal(*pair) for pair in zip(states, random_states(self._view), strict=True))
        results, call.structure = tree_flatten(result)
        self._note(number, call, leaves, results)
        return result

    def _note(self, number: int, call: Call, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        self._check(results, call.name)
        for place, leaf in enumerate(results):
            if isinstance(leaf, Tensor):
                self._returned[id(leaf)] = (number, place), leaf, leaf._version
                self._outputs[_storage(leaf)] = number, place
        passes = [_stand_in(leaf, arguments) for leaf in results]
        call.passes = None if None in passes else [place for place in passes if place is not None]

    def _check(self, leaves: Sequence[Any], name: str) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided:
                    self._refuse(f"block {name!r} takes or returns a tensor of an unknown kind")
            elif not isinstance(leaf, PLAIN):
                self._refuse(f"block {name!r} takes or returns a {type(leaf).__name__}, whose content is unknown")

    def _refuse(self, why: str) -> None:
        self.trace.unfit = self.trace.unfit or why


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree that have storage."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def facts(tensor: Tensor) -> tuple:
    """Return all of a tensor but its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _stand_in(leaf: Any, arguments: Sequence[Any]) -> int | None:
    if leaf is None:
        return -1
    if not isinstance(leaf, Tensor):
        return None
    alike = (i for i, a in enumerate(arguments) if isinstance(a, Tensor) and facts(a) == facts(leaf))
    return next(alike, None)


def executed(order: Sequence[Sequence[str]], found: Trace) -> list[list[str]]:
    """Return the stages in the order in which their weights are first used.

    Weights outside of blocks that were in one stage are told apart by the blocks between which they are used: a lone
    block that was registered beside an input projection comes after what feeds it. Unused weights come last.
    """
    parts: dict[tuple[int, int], list[str]] = {}
    first: dict[tuple[int, int], int] = {}
    for stage, names in enumerate(order):
        for name in names:
            use = found.first_use(name)
            number = len(found.calls) if use is None else use
            alone = use is not None and found.calls[use].alone
            blocks = sum(not call.alone for call in found.calls[:number]) if alone else _BETWEEN
            parts.setdefault((stage, blocks), []).append(name)
            first[stage, blocks] = min(number, first.get((stage, blocks), number))
    return [parts[part] for part in sorted(parts, key=lambda part: (first[part], part))]
