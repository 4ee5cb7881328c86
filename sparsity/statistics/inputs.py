"""Statistics of the layers' inputs, streamed: one object owns every hook, adds up what is asked for batch by batch, and
leaves no trace in the model.

A measure turns the real tokens of a layer's input, (tokens, in), into a tensor that adds up over batches. Pruners name
the one that they need.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsity.errors import UserError
from sparsity.statistics.attention import projected
from sparsity.statistics.checks import UNSEEN, finite, look, not_finite, not_reached
from sparsity.statistics.hessian import gram
from sparsity.statistics.streams import DenseInputs, Tokens, held_out, of_streams, other_tokens
from sparsity.statistics.sums import Measured, SharedSums
from sparsity.view import PrunableView

_PIECE = 1 << 18  # input elements converted to float64 together on the CPU, where they stay in its cache
_LARGE_PIECE = 1 << 28  # on accelerators, which take one reduction an input: 2 GiB of float64
_SMALL = 1 << 16  # parameters of at most so many elements are copied before a pass


def input_norms(rows: Tensor) -> Tensor:
    """(tokens, in) -> (in,): for each input feature the sum of squares over tokens, in float64."""
    return _in_pieces(rows, lambda piece: piece.square_().sum(dim=0))


def input_sums(rows: Tensor) -> Tensor:
    """(tokens, in) -> (in,): the sum of each input feature over tokens, in float64."""
    return _in_pieces(rows, lambda piece: piece.sum(dim=0))


def _in_pieces(rows: Tensor, reduction: Callable[[Tensor], Tensor]) -> Tensor:
    """Add up what a reduction over tokens makes of copies of the rows in the widest type that the device has."""
    wide = widest(rows.device)
    total = rows.new_zeros(rows.shape[1], dtype=wide)
    for piece in rows.split(max(1, (_PIECE if rows.is_cpu else _LARGE_PIECE) // rows.shape[1])):
        total += reduction(piece.to(wide, copy=True))
    return total


def widest(device: torch.device) -> torch.dtype:
    """Return the type in which sums are kept: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"input_norms": input_norms, "input_sums": input_sums, "gram": gram}
STREAMS = of_streams(input_sums)  # measures of more than the rows


@dataclass(frozen=True)
class _Seen:
    """An input that was seen: layers that read the very same tensor (query, key, value) need not measure it again.

    rows: its real tokens (tokens, in), where it is of the dense model. dense: of the dense model, those that it was
    measured with.
    """

    source: ReferenceType
    version: int
    valid: Tensor | None
    measured: Measured | None = None
    rows: Tensor | None = None
    dense: Tensor | None = None

    def matches(self, source: Tensor, valid: Tensor | None) -> bool:
        if self.source() is not source or self.version != source._version:
            return False
        if valid is None or self.valid is None:
            return valid is self.valid
        return valid is self.valid or torch.equal(valid, self.valid)


class _LinearCalls(TorchFunctionMode):
    """Tells of every call of torch.nn.functional.linear: some models (timm's EVA, BEiT and Swin V2) read a layer's
    weight and call that themselves, where no hook of the layer fires.
    """

    def __init__(self, called: Callable[..., None]):
        super().__init__()
        self._called = called

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            self._called(*args, **kwargs)
        return function(*args, **kwargs)


class Statistics:
    """Runs calibration batches through a model and adds up measures of each prunable layer's inputs.

        with Statistics(view, "input_norms") as statistics:
            for batch in batches:
                statistics.add(batch)
        values = statistics.result()  # name -> tensor

    Inside the `with` the model is in eval() and without gradients; afterwards it is what it was, also after an
    exception; it can be entered again. The uses of a tied weight add up. Padding counts where the view says that it
    does not: never. Sums are float64 (float32 on a device without it), and layers that have read the very same tensors
    share them.

    measures: of MEASURES and STREAMS, one or several, from one forward. names: of the weights whose inputs are measured
    (default: all); a layer that stays dense is left out. offload: the sums are kept in the memory of the processor, and
    the accelerator holds what a layer adds to them alone.
    """

    def __init__(
        self,
        view: PrunableView,
        measures: str | Sequence[str],
        names: Collection[str] | None = None,
        *,
        offload: bool = False,
    ):
        self._measures = (measures,) if isinstance(measures, str) else tuple(measures)
        for measure in self._measures:
            if measure not in MEASURES and measure not in STREAMS:
                raise UserError(f"there is no statistic {measure!r}; there are: {', '.join((*MEASURES, *STREAMS))}")
        self._view, self._offload = view, offload
        self._weights = {name: view.weights[name] for name in (view.weights if names is None else names)}
        self._sums = SharedSums(self._roots())
        self._names = {id(weight.parameter): name for name, weight in self._weights.items()}
        self._inside: set[str] = set()  # weights whose layer is being called
        self._called: set[str] = set()  # weights whose layer has been called
        self._passed_over: set[str] = set()  # weights that were used otherwise
        self._batch: Any = None
        self._seen: list[_Seen] = []
        self._number = -1  # of the batch
        self._splits = any(measure.startswith("held_out") for measure in self._measures)
        self._dense: DenseInputs | None = None  # of the batch, where the dense model runs, too
        self._is_dense = False  # whether it is what runs
        self._stack = ExitStack()

    def _roots(self) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        """The layers that may share a sum, and their sums of nothing."""
        alike: dict[tuple[int, torch.device], list[str]] = {}
        for name, weight in self._weights.items():
            alike.setdefault((weight.shape[1], weight.parameter.device), []).append(name)
        for names in alike.values():
            rows = self._weights[names[0]].matrix()[:0]  # (0, in)
            nothing = self._measured(Tokens(rows, torch.zeros(0, dtype=torch.bool, device=rows.device), rows))
            yield names, {measure: value.to(widest(value.device)) for measure, value in nothing.items()}

    def __enter__(self) -> "Statistics":
        with ExitStack() as stack:
            stack.enter_context(untouched(self._view.model))
            for weight in self._weights.values():
                for module, key in zip(weight.modules, weight.uses, strict=True):
                    before, after = partial(self._before, weight.name, key), partial(self._after, weight.name)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._batch, self._dense, self._seen = None, None, []
        self._inside.clear()
        self._stack.close()

    def add(self, batch: Any, run: Callable[[], Any] | None = None, dense: Callable[[], Any] | None = None) -> None:
        """Run one batch through the view's forward, or through `run` in its place: a part of the model, on what it got
        for this batch. dense: runs the same in the dense model before that, for measures of both.
        """
        self._batch, self._number, self._dense = batch, self._number + 1, None
        # Watching every call of a function costs time: not once all layers are known to be called themselves.
        watched = self._passed_over or len(self._called) < len(self._names)
        calls = _LinearCalls(self._linear) if watched else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), calls:
            if dense:
                self._run_dense(dense)
            _ = run() if run else self._view.forward(batch)
        self._seen.clear()
        self._sums.settle()
        if self._dense is not None:
            self._dense.finish()

    def _run_dense(self, run: Callable[[], Any]) -> None:
        """Keep what layers get in a run of the dense model; random numbers are the same in the next run."""
        self._dense, self._is_dense = DenseInputs(), True
        try:
            with torch.random.fork_rng(self._view.accelerators):
                run()
        finally:
            self._is_dense = False
            self._seen.clear()

    def _before(self, name: str, key: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inside.add(name)
        self._called.add(name)
        if isinstance(module, nn.MultiheadAttention):
            source = projected(self._weights[name].attribute, module, args, kwargs)
        else:
            source = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._observe(name, key, source)

    def _after(self, name: str, *_: Any) -> None:
        self._inside.discard(name)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:  # named as in torch
        name = self._names.get(id(weight))
        if name and name not in self._inside:
            self._passed_over.add(name)
            self._observe(name, self._weights[name].uses[0], input)

    def _observe(self, name: str, key: str, source: Tensor) -> None:
        valid = self._view.valid_tokens(key, self._batch)
        alike = [seen for seen in self._seen if seen.matches(source, valid)]
        if self._is_dense:
            self._keep(key, source, valid, alike)
            return
        dense = None if self._dense is None else self._dense.take(key)
        seen = next((seen for seen in alike if seen.dense is dense), None)
        if seen is None:
            rows, samples = _real_rows(key, source, valid), source.shape[0] if source.ndim > 1 else 1
            if dense is not None and dense.shape != rows.shape:
                raise other_tokens(key)
            split = held_out(source.shape, self._number, source.device).reshape(-1) if self._splits else None
            tokens = Tokens(rows, None if split is None else _real(split, valid), dense)
            measured = Measured(self._measured(tokens), samples, len(rows))
            seen = self._remember(_Seen(ref(source), source._version, valid, measured, dense=dense))
        assert seen.measured is not None, "what is remembered was measured, but for the dense model's"
        self._sums.add(name, seen.measured)

    def _keep(self, key: str, source: Tensor, valid: Tensor | None, alike: Sequence[_Seen]) -> None:
        """Keep the input of a layer of the dense model, once for all layers that read it."""
        assert self._dense is not None, "it is there while the dense model runs"
        if alike:
            (seen,) = alike
        else:
            rows = _real_rows(key, source, valid)
            rows = rows.clone() if valid is None else rows  # what is computed in place later must not reach it
            seen = self._remember(_Seen(ref(source), source._version, valid, rows=rows))
        assert seen.rows is not None, "the rows of the dense model are remembered"
        self._dense.add(key, seen.rows)

    def _remember(self, seen: _Seen) -> _Seen:
        self._seen = [s for s in self._seen if s.source() is not None] + [seen]
        return seen

    def _measured(self, tokens: Tokens) -> dict[str, Tensor]:
        found = {m: MEASURES[m](tokens.rows) if m in MEASURES else STREAMS[m](tokens) for m in self._measures}
        return {measure: value.cpu() for measure, value in found.items()} if self._offload else found

    def look(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Report what the first batch tells: every rank calls this once, after its first batch, or without one.

        UserError, naming all layers, for inputs with NaN or Inf; layers that saw nothing on any rank are a warning.
        """
        bad, tokens = self._not_finite(), self.tokens
        facts = {name: (tokens[name] > 0, name not in bad) for name in self._weights}
        look(UNSEEN, "inputs", facts, next(iter(self._weights.values())).parameter.device, all_reduce)

    def _not_finite(self) -> set[str]:
        bad = [shared for shared in self._sums.all() if not all(map(finite, shared.values.values()))]
        return {name for shared in bad for name in shared.names}

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all ranks. all_reduce: tensor -> the sum of that tensor over the ranks; every rank calls it
        for the same tensors.
        """
        self._sums.reduce(all_reduce)

    @property
    def samples(self) -> dict[str, int]:
        """How many samples each layer's inputs came from; a tied weight counts those of all its uses."""
        return {name: self._sums[name].samples for name in self._weights}

    @property
    def tokens(self) -> dict[str, int]:
        """How many real tokens each layer's sum is over."""
        return {name: self._sums[name].tokens for name in self._weights}

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return measure -> name -> the sum over all batches. Names may share a tensor: nobody may write to it.

        UserError, naming all layers concerned, where they saw no real token, or NaN or Inf.
        """
        unseen = [name for name, tokens in self.tokens.items() if tokens == 0]
        if unseen:
            raise not_reached(UNSEEN, unseen)
        bad = self._not_finite()
        if bad:
            raise not_finite("inputs", [name for name in self._weights if name in bad])
        return {each: {name: self._sums[name].values[each] for name in self._weights} for each in self._measures}

    def result(self) -> dict[str, Tensor]:
        """Return name -> the sum over all batches, where there is one measure. As `results` otherwise."""
        (found,) = self.results().values()
        return found


def _real_rows(key: str, source: Tensor, valid: Tensor | None) -> Tensor:
    """(..., in) -> (real tokens, in)."""
    rows = source.detach().reshape(-1, source.shape[-1])
    if valid is None:
        return rows
    if source.shape[:-1] not in (valid.shape, (valid.numel(),)):  # as they are, or flattened; nothing is guessed
        raise UserError(
            f"layer {key!r} has inputs {tuple(source.shape)}, and valid_tokens of shape {tuple(valid.shape)}; where it"
            " reads more than the text, --groups must put it into another group than 'text'"
        )
    return _real(rows, valid)


def _real(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """(all tokens, ...) -> (real tokens, ...)."""
    return tokens if valid is None else tokens[valid.reshape(-1).bool()]


@contextmanager
def untouched(model: nn.Module, moved: Collection[int] = ()) -> Iterator[None]:
    """The model in eval(); afterwards its training flags, buffers and parameters are what they were, to the bit.

    moved: ids of parameters that are changed in place meanwhile (`PrunableView.moved_by_loss`). These, buffers and
    small parameters (a clamped temperature) are copied. Of other large parameters only the storage is remembered,
    which costs no memory: a parameter that was given another one gets its own back, and one that was written to in
    place is an error (RuntimeError), since it cannot be restored.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [(m, dict(m._buffers), [(b, b.clone()) for b in m._buffers.values() if b is not None]) for m in modules]
    parameters = [
        (name, p, p.data, p.data.clone() if p.numel() <= _SMALL or id(p) in moved else None, p._version)
        for name, p in model.named_parameters()
    ]
    model.eval()
    try:
        yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        with torch.no_grad():
            for module, originals, copies in buffers:
                for buffer, copy in copies:
                    buffer.copy_(copy)
                module._buffers.clear()
                module._buffers.update(originals)
            for _, parameter, data, copy, _ in parameters:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                if copy is not None:
                    data.copy_(copy)
    changed = [name for name, p, data, copy, version in parameters if copy is None and p._version != version]
    if changed:
        raise RuntimeError(f"the calibration pass changed {changed[0]!r} in place, and it was too large to be copied")
