"""Calls of blocks that are kept for each calibration batch, and forward passes in which blocks are stubs.

A call is *settled* once its block and all blocks that feed it are pruned and it has been run: its output is final, and
is kept while something still needs it. Other calls keep their arguments, in which the output of a call that is not
settled is a link to it. A stub returns what is kept, or else a `Pending` tensor, which has a shape and no values: code
that reads one ends the pass, so that nothing is ever computed from what is not there.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sparsity.replay.pending import Pending, ReadPending, StopPass
from sparsity.replay.store import Kept, Store
from sparsity.replay.trace import (
    Call,
    Forward,
    Handler,
    Output,
    Trace,
    UnfitError,
    facts,
    intercepted,
    random_states,
    units,
)
from sparsity.view import PrunableView


@dataclass(frozen=True)
class _Link:
    """An argument that another call returns."""

    output: Output


@dataclass
class _Arguments:
    """Arguments of a call. leaves: `Kept`, `_Link`, parameters and buffers, or plain values. states: of the random
    generators, where the call draws. autocast: (device type, enabled, dtype).
    """

    leaves: list[Any]
    structure: Any
    autocast: list[tuple[str, bool, torch.dtype]]
    states: list[Tensor] | None

    def links(self) -> list[Output]:
        return [leaf.output for leaf in self.leaves if isinstance(leaf, _Link)]


@dataclass
class _Left:
    """A tensor that a settled call returned. kept: None where nothing needs its values any more."""

    output: Output
    facts: tuple
    kept: Kept | None = None


@dataclass
class _Result:
    """Output of a settled call. leaves: `_Left`, or plain values. states: of the random generators afterwards."""

    leaves: list[Any]
    structure: Any
    states: list[Tensor] | None


@dataclass
class State:
    """A calibration batch. tokens: which are real, for the key of each use of a weight."""

    tokens: dict[str, Tensor | None]
    captured: dict[int, _Arguments] = field(default_factory=dict)
    results: dict[int, _Result] = field(default_factory=dict)


class LostError(Exception):
    """An output of a settled call is read that was not kept, since the first batch did not read it."""


class Calls:
    """Captures and replays the calls of a traced model.

    stages: name of a weight -> number of its stage. Weights of stages before the one that is asked about are pruned.
    """

    def __init__(self, view: PrunableView, found: Trace, stages: Mapping[str, int], store: Store):
        self._view, self._trace, self._stages, self._store = view, found, stages, store
        self._units = units(view)
        constants = [*view.model.parameters(), *view.model.buffers()]
        self._constants = {id(tensor) for tensor in constants}
        self.held: set[int] = set()  # calls whose outputs are kept once they are settled, whatever needs them

    def numbers(self, names: Collection[str]) -> list[int]:
        """Return the calls that use one of these weights."""
        return [number for number, call in enumerate(self._trace.calls) if not call.weights.isdisjoint(names)]

    def state(self, batch: Any) -> State:
        """Return the state of a batch of which nothing is captured yet."""
        tokens: dict[str, Tensor | None] = {}
        for key in (key for weight in self._view.weights.values() for key in weight.uses):
            valid = self._view.valid_tokens(key, batch)
            known = (other for other in tokens.values() if valid is not None and other is not None)
            tokens[key] = next((other for other in known if torch.equal(other, valid)), valid)  # pyright: ignore
        return State(tokens)

    # Replay

    def settle(self, state: State, stage: int) -> None:
        """Run the captured calls whose blocks, and all that feed them, are pruned before this stage."""
        for number in sorted(state.captured):
            if self._final(state, number, stage):
                self._settle(state, number, *self._run(state, number, {}))

    def ready(self, state: State, names: Collection[str]) -> bool:
        """Return whether all calls that use these weights can be replayed."""
        return all(number in state.captured for number in self._needed(state, self.numbers(names)))

    def evaluate(self, state: State, names: Collection[str], settled_before: int) -> None:
        """Run the calls that use these weights, and those unsettled ones that feed them.

        settled_before: calls whose weights all belong to stages before this one are settled by it.
        """
        values: dict[Output, Tensor] = {}
        for number in sorted(self._needed(state, self.numbers(names))):
            output, states = self._run(state, number, values)
            for place, leaf in enumerate(tree_leaves(output)):
                values[number, place] = leaf
            if self._final(state, number, settled_before):
                self._settle(state, number, output, states)

    def outputs(self, state: State, numbers: Sequence[int]) -> dict[Output, Any]:
        """Return what captured calls, and those unsettled ones that feed them, put out in the model as it is.

        Gradients are the caller's: where they are on, they reach the parameters of all these calls.
        """
        values: dict[Output, Any] = {}
        for number in sorted(self._needed(state, numbers)):
            output, _ = self._run(state, number, values, check=False)
            values |= {(number, place): leaf for place, leaf in enumerate(tree_leaves(output))}
        return values

    def kept(self, state: State, numbers: Sequence[int]) -> dict[Output, Kept]:
        """Return the outputs of settled calls that are kept."""
        lefts = [leaf for number in numbers for leaf in state.results[number].leaves if isinstance(leaf, _Left)]
        return {left.output: left.kept for left in lefts if left.kept is not None}

    def _needed(self, state: State, numbers: Sequence[int]) -> set[int]:
        found, todo = set(), list(numbers)
        while todo:
            number = todo.pop()
            if number not in found and number not in state.results:
                found.add(number)
                arguments = state.captured.get(number)
                todo += [source for source, _ in arguments.links()] if arguments else []
        return found

    def _finished(self, call: Call, stage: int) -> bool:
        return all(self._stages.get(name, -1) < stage for name in call.weights)

    def _final(self, state: State, number: int, stage: int) -> bool:
        sources = state.captured[number].links()
        return self._finished(self._trace.calls[number], stage) and all(n in state.results for n, _ in sources)

    def _run(
        self, state: State, number: int, values: Mapping[Output, Tensor], check: bool = True
    ) -> tuple[Any, list[Tensor] | None]:
        """Return the output of a call on its captured arguments, and the states of the random generators afterwards.

        values: outputs of calls that are not settled. check: it has to be as a stub of the call would promise.
        """
        call, arguments = self._trace.calls[number], state.captured[number]
        leaves = [self._value(state, leaf, values) for leaf in arguments.leaves]
        args, kwargs = tree_unflatten(leaves, arguments.structure)
        # Hooks of a block have seen its arguments when these were captured; those of a layer measure it.
        run = call.module if call.alone else call.module.forward
        with _arithmetic(arguments.autocast), self._random(arguments.states):
            output = run(*args, **kwargs)
            if check:
                self._check(number, call, leaves, tree_leaves(output))
            return output, None if arguments.states is None else random_states(self._view)

    def _value(self, state: State, leaf: Any, values: Mapping[Output, Tensor]) -> Any:
        if isinstance(leaf, _Link) and leaf.output in values:
            return values[leaf.output]
        if isinstance(leaf, _Link):
            number, place = leaf.output
            leaf = state.results[number].leaves[place].kept
            assert leaf is not None, "outputs are kept while a captured call needs them"
        return self._store.get(leaf) if isinstance(leaf, Kept) else leaf

    def _check(self, number: int, call: Call, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        """Outputs are as the stub promised."""
        for place, stand_in in enumerate(call.passes or ()):
            if stand_in >= 0 and facts(results[place]) != facts(arguments[stand_in]):
                raise UnfitError(f"block {call.name!r} returns another shape than in the first batch (call {number})")

    @contextmanager
    def _random(self, states: list[Tensor] | None):
        if states is None:
            yield
            return
        with torch.random.fork_rng(self._view.accelerators):
            self._set_random(states)
            yield

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], self._view.accelerators, strict=True):
            torch.cuda.set_rng_state(state, device)

    def _settle(self, state: State, number: int, output: Any, states: list[Tensor] | None) -> dict[int, Kept]:
        """Keep of an output what is still needed; returns id of a tensor -> its copy."""
        arguments = state.captured.pop(number, None)
        leaves, structure = tree_flatten(output)
        result = _Result(list(leaves), structure, states)
        state.results[number] = result
        wanted, copies = self._wanted(state), {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                left = result.leaves[place] = _Left((number, place), facts(leaf))
                if left.output in wanted or number in self.held:
                    left.kept = copies[id(leaf)] = self._store.put(leaf)
                    left.kept.users += 1
        for leaf in arguments.leaves if arguments else ():
            if isinstance(leaf, Kept):
                self._store.release(leaf)
        for left in (leaf for result in state.results.values() for leaf in result.leaves if isinstance(leaf, _Left)):
            if left.kept is not None and left.output not in wanted and left.output[0] not in self.held:
                self._store.release(left.kept)
                left.kept = None
        return copies

    def _wanted(self, state: State) -> set[Output]:
        """Outputs of settled calls that are needed: by captured calls, or in a forward pass that captures the rest."""
        wanted = {output for arguments in state.captured.values() for output in arguments.links()}
        rest = [n for n in range(len(self._trace.calls)) if n not in state.captured and n not in state.results]
        if rest:
            wanted |= self._trace.read | {source for n in rest for source in self._trace.calls[n].sources}
        return wanted

    def forget(self, state: State) -> None:
        """Let go of all that is kept of a batch."""
        lefts = [leaf.kept for result in state.results.values() for leaf in result.leaves if isinstance(leaf, _Left)]
        for leaf in [*lefts, *(leaf for arguments in state.captured.values() for leaf in arguments.leaves)]:
            if isinstance(leaf, Kept):
                self._store.release(leaf)
        state.captured.clear()
        state.results.clear()

    # Forward passes with stubs

    def capture(self, state: State, batch: Any, stage: int) -> None:
        """Run the model with stubs until code between blocks reads what no block has computed yet.

        Calls that can be settled before this stage are run; of others the arguments are captured. Raises `LostError`
        where an output is read that the first batch did not read.
        """
        try:
            self._forward(batch, _Capturing(self, state, stage))
        except ReadPending as read:
            if read.output[0] in state.results:
                raise LostError from None

    def live(self, state: State, batch: Any, names: Collection[str]) -> None:
        """Run the model, its settled calls as stubs and all others as they are, up to the last use of the weights."""
        last = None if self._trace.between.intersection(names) else max(self.numbers(names), default=None)
        try:
            self._forward(batch, _Live(self, state, last))
        except ReadPending as read:
            raise UnfitError(
                f"an output of block {self._trace.calls[read.output[0]].name!r} is read now and then"
            ) from None

    def _forward(self, batch: Any, handler: Handler) -> None:
        try:
            with intercepted(self._units, handler):
                self._view.forward(batch)
        except StopPass:
            pass


class _Stubs:
    """Takes the calls of one forward pass."""

    def __init__(self, calls: Calls, state: State):
        self._calls, self._state = calls, state
        self._count = 0
        self._copies: dict[int, tuple[Tensor, int, Kept]] = {}  # id -> tensor, its version, its copy

    def _next(self, module: nn.Module) -> tuple[int, Call]:
        number, known = self._count, self._calls._trace.calls
        self._count += 1
        if number >= len(known) or known[number].module is not module:
            name = self._calls._units[module]
            raise UnfitError(f"block {name!r} is called where it is not in the first batch (call {number})")
        return number, known[number]

    def _again(self, result: _Result) -> Any:
        """Return the output of a settled call once more."""
        leaves = list(result.leaves)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, _Left):
                leaves[place] = Pending(leaf.output, *leaf.facts)
                if leaf.kept is not None:
                    leaves[place] = tensor = self._calls._store.get(leaf.kept)
                    self._copies[id(tensor)] = tensor, tensor._version, leaf.kept
        if result.states is not None:
            self._calls._set_random(result.states)
        return tree_unflatten(leaves, result.structure)


class _Live(_Stubs):
    """Runs what is not settled. last: number of the call after which the pass ends."""

    def __init__(self, calls: Calls, state: State, last: int | None):
        super().__init__(calls, state)
        self._last = last

    def __call__(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if self._last is not None and self._count > self._last:
            raise StopPass
        number, _ = self._next(module)
        result = self._state.results.get(number)
        return forward(*args, **kwargs) if result is None else self._again(result)


class _Capturing(_Stubs):
    """Settles what it can, and captures the arguments of the rest."""

    def __init__(self, calls: Calls, state: State, stage: int):
        super().__init__(calls, state)
        self._stage = stage

    def __call__(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        number, call = self._next(module)
        if number in self._state.results:
            return self._again(self._state.results[number])
        leaves, structure = tree_flatten((args, kwargs))
        links = [leaf.output for leaf in leaves if isinstance(leaf, Pending)]
        lost = next((output for output in links if output[0] in self._state.results), None)
        if lost is not None:
            raise ReadPending(lost)
        if self._calls._finished(call, self._stage) and not links:
            return self._run(number, call, lambda: forward(*args, **kwargs))
        if number not in self._state.captured:
            self._state.captured[number] = self._arguments(call, leaves, structure)
        if call.passes is None or call.draws:
            raise StopPass
        outputs = [Pending((number, k), *facts(leaves[i])) if i >= 0 else None for k, i in enumerate(call.passes)]
        return tree_unflatten(outputs, call.structure)

    def _run(self, number: int, call: Call, run: Callable[[], Any]) -> Any:
        output = run()
        states = random_states(self._calls._view) if call.draws else None
        for tensor_id, kept in self._calls._settle(self._state, number, output, states).items():
            tensor = next(leaf for leaf in tree_leaves(output) if id(leaf) == tensor_id)
            self._copies[tensor_id] = tensor, tensor._version, kept
        return output

    def _arguments(self, call: Call, leaves: Sequence[Any], structure: Any) -> _Arguments:
        autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", self._calls._view.device.type))
        ]
        states = random_states(self._calls._view) if call.draws else None
        return _Arguments([self._captured(leaf) for leaf in leaves], structure, autocast, states)

    def _captured(self, leaf: Any) -> Any:
        if isinstance(leaf, Pending):
            return _Link(leaf.output)
        if not isinstance(leaf, Tensor) or id(leaf) in self._calls._constants:
            return leaf
        tensor, version, kept = self._copies.get(id(leaf), (None, -1, None))
        if kept is None or tensor is not leaf or version != leaf._version:
            kept = self._calls._store.put(leaf)
            self._copies[id(leaf)] = leaf, leaf._version, kept
        kept.users += 1
        return kept


@contextmanager
def _arithmetic(autocast: Sequence[tuple[str, bool, torch.dtype]]):
    """Autocast as it was where a call was captured."""
    with ExitStack() as stack:
        for kind, enabled, dtype in autocast:
            if (enabled, dtype) != (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield
