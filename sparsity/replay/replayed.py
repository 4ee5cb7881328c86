"""Sequential calibration without running the whole model for each block.

One traced forward pass tells in which order blocks are called. The arguments of their calls are then captured once a
chain (blocks that feed each other), and a block costs two of its own calls a batch: one under the statistics, with the
pruned blocks' outputs as its inputs, and one with its pruned weights, for the block that follows. The batches are read
again once for each chain only. What cannot be captured is measured in a pass through the model, with the pruned blocks
as stubs where the trace can be trusted; the log says which stages, and why.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsity.replay.capture import Calls, LostError, State
from sparsity.replay.store import Store
from sparsity.replay.trace import Trace, UnfitError, executed, trace
from sparsity.replay.uses import NO_USES, Uses, own_calls, trainable, uncached_casts, use_of
from sparsity.statistics.inputs import Statistics, untouched
from sparsity.statistics.passes import measures_of, scaled
from sparsity.statistics.readers import by_inputs
from sparsity.view import PrunableView, eager

logger = logging.getLogger(__name__)

Run = Callable[[], Any]
Sums = dict[str, dict[str, Tensor]]  # statistic -> name of a weight -> tensor


class Replayed:
    """Measures the inputs of one stage after another, each in the model as it is when it is asked for.

    batches: gives a fresh pass over the same calibration batches at each call. order: stages of weight names, of which
    the attribute `order` is what `measure` takes, one after the other: by the time a stage is measured, the weights of
    those before it have become what they will be. progress: wraps the batches of a pass. reduce: sums a tensor over
    ranks, each of which has its own batches. dense: the weights stay as they are, so that one call of each block does.
    budget: bytes of captured tensors that are held in memory; beyond it they lie in a file in the folder `spill`, which
    vanishes with the process. divided: stages are divided into the layers that read the same tensors. offload: sums are
    kept in the processor's memory. both: the dense model runs beside the pruned one, for statistics of both. outputs:
    what it gives is kept for `uses`, which needs both. Autocast is the caller's.

    put: set it where weights change between stages: called with the numbers of the stages whose pruned weights a
    measurement needs, it puts these into the model, and all others back to what they were.

    Use it as a context manager, or call `close`.
    """

    put: Callable[[Collection[int]], None] | None = None

    def __init__(
        self,
        view: PrunableView,
        batches: Callable[[], Iterable[Any]],
        order: Sequence[Sequence[str]],
        *,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        dense: bool = False,
        divided: bool = False,
        budget: int | None = None,
        spill: Path | None = None,
        offload: bool = False,
        both: bool = False,
        outputs: bool = False,
    ):
        self._view, self._batches, self._reduce, self._dense = view, batches, reduce, dense
        self._progress, self._offload, self._outputs = progress or (lambda batches: batches), offload, both and outputs
        self._device = view.device
        self._store = Store(budget, spill)
        self._states: list[State] = []
        self._position = -1  # the stage that was measured last
        self._trace = self._traced()
        self.order = self._agreed(self._divided(order) if divided else [list(names) for names in order])
        self._numbers = {tuple(names): number for number, names in enumerate(self.order)}
        self._stages = {name: number for number, names in enumerate(self.order) for name in names}
        self._calls = Calls(view, self._trace, self._stages, self._store)
        self._beside = _Beside(Calls(view, self._trace, self._stages, self._store)) if both else None
        self._pruned: list[int] = []  # stages whose pruned weights are in the model

    def __enter__(self) -> "Replayed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything that is captured."""
        self._forget()
        self._store.close()

    def measure(self, names: Sequence[str], statistics: Sequence[str], only: Sequence[str] | None = None) -> Sums:
        """Return the statistics of the weights of a stage, of those that `sparsity.statistics.passes` makes of inputs.

        only: of the stage, the weights whose statistics are wanted (default: all).

        Raises ValueError for names that are no stage of `order`, and UserError for a layer that saw no real token, or
        NaN or Inf.
        """
        if tuple(names) not in self._numbers:
            raise ValueError(f"{names[0]!r} and what comes with it are not a stage")
        number, wanted = self._numbers[tuple(names)], names if only is None else only
        torch.clear_autocast_cache()  # weights have changed under it
        try:
            found = self._replayed(number, names, statistics, wanted) if self._trace.unfit is None else None
        except UnfitError as reason:
            self._give_up(str(reason))
            found = None
        if found is None:
            self._put_all(number)
            runs = ((batch, None, partial(self._view.forward, batch)) for batch in self._over())
            found = self._gathered(wanted, statistics, runs)
        torch.clear_autocast_cache()
        self._position = number
        return self._reduced(found, statistics)

    def _replayed(
        self, number: int, names: Sequence[str], statistics: Sequence[str], wanted: Sequence[str]
    ) -> Statistics:
        """Return the sums over this rank's batches. Raises `UnfitError` where these are not as the trace has it."""
        self._go_on(number)
        self._put_unsettled(number)
        beside = self._beside or _Beside(self._calls)
        beside.calls.held = set(beside.calls.numbers(names)) if self._outputs else set()
        with self._quiet():
            for state in self._states:
                self._calls.settle(state, number)
            with self._unpruned():
                for state in beside.states:
                    beside.calls.settle(state, number)
        if not self._ready(names):
            self._capture(number)
        states = zip_longest(self._states, beside.states)
        if self._ready(names):
            settled_before = number + 1 if self._dense else 0
            runs = (
                (
                    state,
                    partial(self._calls.evaluate, state, names, settled_before),
                    partial(beside.calls.evaluate, other, names, number + 1),
                )
                for state, other in states
            )
            return self._gathered(wanted, statistics, runs)
        logger.info("%s: measured in a pass through the model: what feeds it is not there before", names[0])
        runs = (
            (batch, partial(self._calls.live, state, batch, names), partial(beside.calls.live, other, batch, names))
            for (state, other), batch in zip(states, self._over(), strict=True)
        )
        return self._gathered(wanted, statistics, runs)

    @property
    def unfit(self) -> str | None:
        """Return why blocks cannot be run by themselves, or None."""
        return self._trace.unfit

    @contextmanager
    def uses(self, names: Sequence[str], window: str) -> Iterator[Uses]:
        """Give the calls of the block that was measured last, which can be run inside the context.

        names: of its stage. window: of `sparsity.run.axes.WINDOWS`. There are none where the block cannot be run by
        itself, or where the layers are in no block.
        """
        number = self._numbers[tuple(names)]
        own = own_calls(self._trace, self._stages, number) if self._position == number else []
        beside = self._beside
        if not own or beside is None or self._trace.unfit or not self._ready(names):
            yield NO_USES
            return
        found = Uses(trainable(self._view, self._trace, own, names, window), [])
        known = self._view, self._trace, own, self._store
        for state, other in zip(self._states, beside.states, strict=True):
            if all(call in other.results for call in own):
                found.uses.append(use_of(*known, (self._calls, state), (beside.calls, other)))
        whole = len(found.uses) == len(self._states)
        with self._quiet(), uncached_casts():
            yield found if whole else NO_USES

    def _put_unsettled(self, number: int) -> None:
        """Put in the pruned weights of the stages before this one that are not only used by settled calls."""
        if self.put is None:
            return
        used = set().union(*(call.weights for call in self._trace.calls))
        settled = [all(call in state.results for state in self._states) for call in range(len(self._trace.calls))]
        running = [call.weights for call, done in zip(self._trace.calls, settled, strict=True) if not done]
        needed = set().union(*running) if self._states else used
        before = enumerate(self.order[:number])
        self._put([stage for stage, names in before if not used.issuperset(names) or needed.intersection(names)])

    def _put_all(self, number: int) -> None:
        """Put in the pruned weights of all stages before this one."""
        self._put(range(number))

    def _put(self, stages: Collection[int]) -> None:
        """Put in the pruned weights of these stages."""
        if self.put is not None:
            self.put(stages)
            self._pruned = list(stages)

    @contextmanager
    def _unpruned(self) -> Iterator[None]:
        """The dense model inside the block."""
        pruned = self._pruned
        if not pruned:
            yield
            return
        self._put(())
        try:
            yield
        finally:
            self._put(pruned)

    def _ready(self, names: Sequence[str]) -> bool:
        """Return whether replayed calls are all that uses these weights."""
        if not self._states or not self._calls.numbers(names) or self._trace.between.intersection(names):
            return False
        beside = all(self._beside.calls.ready(state, names) for state in self._beside.states) if self._beside else True
        return beside and all(self._calls.ready(state, names) for state in self._states)

    def _go_on(self, number: int) -> None:
        """Begin anew for an earlier stage, and after weights that code between blocks reads."""
        passed = {name for names in self.order[max(self._position, 0) : number] for name in names}
        if number < self._position or (self._dense and number == self._position) or passed & self._trace.between:
            self._forget()

    def _capture(self, number: int) -> None:
        try:
            self._capture_all(number)
        except LostError:  # pruned blocks are run once more
            self._forget()
            self._put_all(number)
            self._capture_all(number)
        there = [set(state.captured) | set(state.results) for state in self._states]
        logger.info(
            "captured up to %d of %d calls, %.3g MB in memory",
            len(set.union(*there)) if there else 0,
            len(self._trace.calls),
            self._store.held / 1e6,
        )

    def _capture_all(self, number: int) -> None:
        fresh = not self._states
        with self._quiet():
            for place, batch in enumerate(self._over()):
                if fresh:
                    self._states.append(self._calls.state(batch))
                if self._beside:
                    self._capture_beside(self._beside, place, batch, number)
                self._calls.capture(self._states[place], batch, number)

    def _capture_beside(self, beside: "_Beside", place: int, batch: Any, number: int) -> None:
        """Capture the calls of the dense model, which draws the random numbers that the pruned one will draw."""
        if place == len(beside.states):
            beside.states.append(beside.calls.state(batch))
        with self._unpruned(), torch.random.fork_rng(self._view.accelerators):
            beside.calls.capture(beside.states[place], batch, number)

    def _gathered(
        self, names: Collection[str], statistics: Sequence[str], runs: Iterable[tuple[Any, Run | None, Run]]
    ) -> Statistics:
        """Return the sums over this rank's batches. runs: (batch or its state, what is run in place of the model, and
        what in place of the dense one).
        """
        kinds = measures_of(statistics)
        with self._quiet(), Statistics(_Recalled(self._view), kinds, names, offload=self._offload) as sums:
            for batch, run, dense in runs:
                sums.add(batch, run, partial(self._as_dense, dense) if self._beside else None)
        return sums

    def _as_dense(self, run: Run) -> None:
        with self._unpruned():
            run()

    def _reduced(self, found: Statistics, statistics: Sequence[str]) -> Sums:
        if self._reduce is not None:
            found.reduce(self._reduce)
        return scaled(found.results(), found.tokens, statistics)

    def _traced(self) -> Trace:
        batch = next(iter(self._batches()), None)
        if batch is None:
            return Trace(unfit="there are no batches")
        try:
            with self._quiet():
                found = trace(self._view, batch)
        except Exception as error:  # models do what they like; without the trace an error of their own comes again
            found = Trace(unfit=f"the traced forward pass failed: {type(error).__name__}: {error}")
        logger.debug("order of blocks: %s", found.describe())
        if found.unfit:
            logger.warning("sequential calibration runs the whole model for each block: %s", found.unfit)
        return found

    def _divided(self, order: Sequence[Sequence[str]]) -> list[list[str]]:
        batch = next(iter(self._batches()), None)
        if batch is None:  # other ranks know
            return [list(names) for names in order]
        with self._quiet():
            return by_inputs(self._view, order, batch)

    def _agreed(self, order: list[list[str]]) -> list[list[str]]:
        """Return the stages as they are executed, where all ranks have seen the same; else as they are given."""
        found = executed(order, self._trace) if self._trace.calls else order
        if self._reduce is None:
            return found
        place = {name: (number, k) for number, names in enumerate(found) for k, name in enumerate(names)}
        mine = [place[name][0] for names in order for name in names] + [1]
        seen = torch.tensor(mine, dtype=torch.float64, device=self._device) * bool(self._trace.calls)
        total, squares = self._reduce(seen), self._reduce(seen.square())
        if torch.equal(total[-1] * squares, total.square()):  # equality of Cauchy and Schwarz: all are the same
            return found if self._trace.calls else _sorted(order, total / total[-1].clamp(min=1))
        logger.warning("blocks are called in another order on another rank: they are pruned as they are registered")
        return order

    def _give_up(self, reason: str) -> None:
        logger.warning("sequential calibration runs the whole model for each block from here on: %s", reason)
        self._trace.unfit = reason
        self._forget()

    def _forget(self) -> None:
        for state in self._states:
            self._calls.forget(state)
        self._states = []
        if self._beside:
            self._beside.forget()

    def _over(self) -> Iterable[Any]:
        return self._progress(self._batches())

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """The model in eval(), without gradients and without caches of keys and values."""
        model = self._view.model
        with untouched(model), eager(model), _uncached(self._view), torch.inference_mode(False), torch.no_grad():
            yield


@dataclass
class _Beside:
    """The calls of the dense model, which run beside the pruned one's. states: as many as batches."""

    calls: Calls
    states: list[State] = field(default_factory=list)

    def forget(self) -> None:
        """Let go of everything that is captured."""
        for state in self.states:
            self.calls.forget(state)
        self.states = []


class _Recalled(PrunableView):
    """The view, which also knows of captured batches what tokens are real."""

    def __init__(self, view: PrunableView):
        self.__dict__.update(view.__dict__)

    def valid_tokens(self, key: str, batch: Any) -> Tensor | None:
        return batch.tokens[key] if isinstance(batch, State) else super().valid_tokens(key, batch)


@contextmanager
def _uncached(view: PrunableView) -> Iterator[None]:
    """Models with a configuration of transformers' kind keep no keys and values, which no calibration reads."""
    configs: list[Any] = [vars(module).get("config") for module in view.model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def _sorted(order: Sequence[Sequence[str]], stages: Tensor) -> list[list[str]]:
    """The stages as other ranks have them. stages: number of the stage of each weight."""
    found: dict[int, list[str]] = {}
    for name, stage in zip((name for names in order for name in names), stages.tolist(), strict=False):
        found.setdefault(round(stage), []).append(name)
    return [names for _, names in sorted(found.items())]
