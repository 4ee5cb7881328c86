"""Forward passes over one batch, between which few weights change: a block that would compute the same once more gives
what it gave the first time.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sparsity.replay.trace import PLAIN, Forward, Handler, facts, intercepted, tensors


class Budget:
    """Bytes that may still be kept, by all batches together; None: without a limit."""

    def __init__(self, left: int | None):
        self._left = left

    def take(self, size: int) -> bool:
        """Return whether so many bytes are left, and take them."""
        if self._left is not None:
            if size > self._left:
                return False
            self._left -= size
        return True


@dataclass(frozen=True)
class _Call:
    """A call that was recorded: leaves and structure of its arguments and of its output. versions: of the tensors among
    these leaves, which count the changes in place.
    """

    module: nn.Module
    given: Sequence[Any]
    asked: Any
    made: Sequence[Any]
    structure: Any
    versions: Sequence[int]

    def repeats(self, module: nn.Module, leaves: Sequence[Any], asked: Any) -> bool:
        """Return whether the module would be called as it was, and all is there as it was."""
        if module is not self.module or asked != self.asked or self.versions != _versions(self.given, self.made):
            return False
        return all(_same(*pair) for pair in zip(leaves, self.given, strict=True))


class Repeated:
    """The calls of a model's blocks in forward passes over one batch.

    blocks: as `sparsity.replay.trace.units` finds them. Of calls beyond the budget nothing is kept: they are always
    run. The model is in eval(), without gradients: what it draws at random would be drawn once only.
    """

    def __init__(self, blocks: Collection[nn.Module], budget: Budget):
        self._blocks, self._budget = blocks, budget
        self._calls: list[_Call | None] = []
        self._known: dict[int, Tensor] = {}  # id of a tensor that is kept -> itself

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the context, calls are run and kept: for the first pass over the batch."""
        with intercepted(self._blocks, self._record):
            yield

    @contextmanager
    def repeated(self, changed: nn.Parameter) -> Iterator[None]:
        """Within the context, only calls are run that a parameter's change reaches: for one pass over the same batch.

        Those are the calls of blocks that have the parameter, and those that take other numbers than they took.
        """
        reached = {block for block in self._blocks if any(own is changed for own in block.parameters())}
        with intercepted(self._blocks, self._repeat(reached)):
            yield

    def _record(self, module: nn.Module, forward: Forward, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        given, asked = tree_flatten((args, dict(kwargs)))
        made, structure = tree_flatten(output)
        new = {id(tensor): tensor for tensor in tensors([*given, *made]) if id(tensor) not in self._known}
        plain = all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in (*given, *made))
        if plain and self._budget.take(sum(tensor.nbytes for tensor in new.values())):
            self._known |= new
            self._calls.append(_Call(module, given, asked, made, structure, _versions(given, made)))
        else:
            self._calls.append(None)
        return output

    def _repeat(self, reached: Collection[nn.Module]) -> Handler:
        calls = iter(self._calls)

        def handler(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            call = next(calls, None)
            if call is not None and module not in reached and call.repeats(module, *tree_flatten((args, dict(kwargs)))):
                return tree_unflatten(list(call.made), call.structure)
            return forward(*args, **kwargs)

        return handler


def _versions(given: Sequence[Any], made: Sequence[Any]) -> list[int]:
    return [tensor._version for tensor in tensors([*given, *made])]


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return facts(now) == facts(before) and torch.equal(now, before)
    return type(now) is type(before) and not isinstance(now, Tensor) and bool(now == before)
