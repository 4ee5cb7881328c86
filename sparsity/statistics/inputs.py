"""Statistics of the layers' inputs, streamed: one object owns every hook, adds up what is asked for batch by batch, and
leaves no trace in the model.

A measure turns the real tokens of a layer's input, (tokens, in), into a tensor that adds up over batches. Pruners name
the one that they need.
"""

from collections.abc import Callable, Collection, Iterator
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
from sparsity.statistics.hessian import gram
from sparsity.view import PrunableView

_PIECE = 1 << 18  # input elements converted to float64 together
_SMALL = 1 << 16  # parameters of at most so many elements are copied before a pass


def input_norms(rows: Tensor) -> Tensor:
    """(tokens, in) -> (in,): for each input feature the sum of squares over tokens, in float64."""
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for piece in rows.split(max(1, _PIECE // rows.shape[1])):
        total += piece.to(torch.float64, copy=True).square_().sum(dim=0)
    return total


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {"input_norms": input_norms, "gram": gram}


@dataclass
class _Sum:
    """What a layer has seen."""

    value: Tensor
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Seen:
    """A measured input: layers that read the very same tensor (query, key, value) need not measure it again."""

    source: ReferenceType
    version: int
    valid: Tensor | None
    measured: Tensor
    tokens: int

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
    """Runs calibration batches through a model and adds up a measure of each prunable layer's inputs.

        with Statistics(view, "input_norms") as statistics:
            for batch in batches:
                statistics.add(batch)
        values = statistics.result()  # name -> tensor

    Inside the `with` the model is in eval() and without gradients; afterwards it is what it was, also after an
    exception. The uses of a tied weight add up. Padding counts where the view says that it does not: never. Sums are
    float64. names: of the weights whose inputs are measured (default: all). offload: the sums are kept in the memory of
    the processor, and the accelerator holds what a layer adds to them alone.
    """

    def __init__(
        self, view: PrunableView, measure: str, names: Collection[str] | None = None, *, offload: bool = False
    ):
        if measure not in MEASURES:
            raise UserError(f"there is no statistic {measure!r}; there are: {', '.join(MEASURES)}")
        self._view, self._measure, self._offload = view, MEASURES[measure], offload
        self._weights = {name: view.weights[name] for name in (view.weights if names is None else names)}
        # Allocated before the first forward: between its activations they would leave holes in memory.
        nothing = {name: weight.matrix()[:0] for name, weight in self._weights.items()}  # (0, in)
        self._sums = {name: _Sum(self._measured(rows).double()) for name, rows in nothing.items()}
        self._names = {id(weight.parameter): name for name, weight in self._weights.items()}
        self._inside: set[str] = set()  # weights whose layer is being called
        self._called: set[str] = set()  # weights whose layer has been called
        self._passed_over: set[str] = set()  # weights that were used otherwise
        self._batch: Any = None
        self._seen: list[_Seen] = []
        self._stack = ExitStack()

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
        self._batch, self._seen = None, []
        self._inside.clear()
        self._stack.close()

    def add(self, batch: Any, run: Callable[[], Any] | None = None) -> None:
        """Runs one batch through the view's forward, or calls `run` in its place."""
        self._batch = batch
        # Watching every call of a function costs time: not once all layers are known to be called themselves.
        watched = self._passed_over or len(self._called) < len(self._names)
        calls = _LinearCalls(self._linear) if watched else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), calls:
            run() if run else self._view.forward(batch)
        self._seen.clear()

    def _before(self, name: str, key: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inside.add(name)
        self._called.add(name)
        self._observe(name, key, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def _after(self, name: str, *_: Any) -> None:
        self._inside.discard(name)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:  # named as in torch
        name = self._names.get(id(weight))
        if name and name not in self._inside:
            self._passed_over.add(name)
            self._observe(name, self._weights[name].uses[0], input)

    def _observe(self, name: str, key: str, source: Tensor) -> None:
        valid = self._view.valid_tokens(key, self._batch)
        seen = next((s for s in self._seen if s.matches(source, valid)), None)
        if seen is None:
            rows = _real_rows(key, source, valid)
            seen = _Seen(ref(source), source._version, valid, self._measured(rows), len(rows))
            self._seen = [s for s in self._seen if s.source() is not None] + [seen]
        entry = self._sums[name]
        add(entry.value, seen.measured)
        entry.samples += source.shape[0] if source.ndim > 1 else 1
        entry.tokens += seen.tokens

    def _measured(self, rows: Tensor) -> Tensor:
        measured = self._measure(rows)
        return measured.cpu() if self._offload else measured

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Adds the sums of all ranks. all_reduce: tensor -> the sum of that tensor over the ranks; every rank calls it
        for the same tensors.
        """
        for entry in self._sums.values():
            entry.value = all_reduce(entry.value)
            counts = all_reduce(torch.tensor([entry.samples, entry.tokens], device=entry.value.device))
            entry.samples, entry.tokens = counts.tolist()

    @property
    def samples(self) -> dict[str, int]:
        """How many samples each layer's inputs came from; a tied weight counts those of all its uses."""
        return {name: entry.samples for name, entry in self._sums.items()}

    @property
    def tokens(self) -> dict[str, int]:
        """How many real tokens each layer's sum is over."""
        return {name: entry.tokens for name, entry in self._sums.items()}

    def result(self) -> dict[str, Tensor]:
        """Name -> the sum over all batches. UserError that names a layer which saw no real token, or NaN or Inf."""
        for name, entry in self._sums.items():
            if entry.tokens == 0:
                raise UserError(f"layer {name!r} saw no calibration sample")
            if not entry.value.isfinite().all():
                raise UserError(f"the inputs of layer {name!r} hold NaN or Inf")
        return {name: entry.value for name, entry in self._sums.items()}


def add(total: Tensor, measured: Tensor) -> None:
    """In place. On the processor a float32 tensor is converted piece by piece: several times as fast as at once."""
    if total.dtype == measured.dtype or not total.is_cpu:
        total += measured
        return
    for piece, more in zip(total.view(-1).split(_PIECE), measured.view(-1).split(_PIECE), strict=True):
        piece += more.double()


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
    return rows[valid.reshape(-1).bool()]


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
