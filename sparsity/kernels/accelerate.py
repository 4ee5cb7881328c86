"""Each layer of a pruned model computed in the fastest way: dense, or by a kernel that leaves zeros out. A trial on the
layer's real input shape decides, since no rule holds for all processors, shapes and batch sizes.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.kernels.candidates import DENSE, candidates
from sparsity.masks import Masks
from sparsity.run.generic import generic_view
from sparsity.view import PrunableView, PrunableWeight

Trial = Callable[[Mapping[str, nn.Module], Tensor], dict[str, float]]  # layers, inputs -> seconds of each
_SHORTEST = 2e-3  # seconds that one measurement takes at least, by several calls


@dataclass(frozen=True)
class Choice:
    """How one layer is computed. seconds: median of each way that was tried. kept: share of the weights that are not
    zero. tokens: rows of its input; 0 where it is not called as a layer. why: of the choice, and of what was not tried.
    """

    name: str
    shape: tuple[int, int]  # (out, in)
    kept: float
    tokens: int
    kind: str
    seconds: Mapping[str, float]
    why: str

    @property
    def gain(self) -> float:
        """Return how many times as fast as the dense layer it was in the trial."""
        return self.seconds[DENSE] / self.seconds[self.kind] if self.seconds else 1.0


@dataclass(frozen=True)
class _Place:
    """A layer of the model: its place, the original, and its replacement."""

    parent: nn.Module
    name: str
    own: nn.Module
    fast: nn.Module


class Accelerated:
    """A model some of whose layers are computed by other kernels, until `restore` puts its own layers back.

    choices: of all prunable layers, in the model's order.
    """

    def __init__(self, view: PrunableView, choices: list[Choice], places: list[_Place]):
        self.view, self.choices, self._places = view, choices, places
        self.engage()

    def engage(self) -> None:
        """Put the fast layers in place."""
        for place in self._places:
            setattr(place.parent, place.name, place.fast)

    def restore(self) -> None:
        """Put the model's own layers back; `engage` takes them out again."""
        for place in self._places:
            setattr(place.parent, place.name, place.own)

    def table(self) -> str:
        """Return what was chosen for each layer, and why, as a Markdown table."""
        columns = (
            "layer",
            "out x in",
            "zeros %",
            "tokens",
            "dense ms",
            "chosen",
            "ms",
            "gain",
            "why, and what else was tried",
        )
        lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * 7 + "---|"]
        for each in self.choices:
            times = [f"{1000 * each.seconds[kind]:.2f}" if each.seconds else "-" for kind in (DENSE, each.kind)]
            cells = [each.name.removesuffix(".weight"), "{} x {}".format(*each.shape), f"{100 * (1 - each.kept):.1f}"]
            cells += [str(each.tokens or "-"), times[0], each.kind, times[1], f"{each.gain:.2f}", each.why]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


@torch.no_grad()
def accelerate(
    model: nn.Module | PrunableView,
    masks: Masks | None = None,
    *,
    batch: Any,
    forward: Callable[[Any], Any] | None = None,
    rounds: int = 7,
    margin: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> Accelerated:
    """Replace each prunable layer, for inference, by the fastest way to compute it: dense, CSR, blocks of 4 x 4 or 16 x
    16 (CPU, float32), or 2:4 (GPU of compute capability 8.0, 16 bits).

        fast = accelerate(model, Masks.load("masks.safetensors"), batch=images)
        print(fast.table())

    model: a view of it, or any module, whose forward pass takes the batch. masks: by which it is pruned first; None:
    its zeros are those that it has. batch: one as it will be used; its size decides. forward: runs one, in place of the
    view's own pass. rounds: of all ways in turns. margin: by how much a kernel must be faster than the dense layer,
    beyond noise. clock: seconds; `time.process_time` for a CPU that others use too. The model is changed in place;
    `Accelerated.restore` puts its own layers, which stay in memory, back. Raises UserError where a mask does not fit.
    """
    view = generic_view(model)
    if masks is not None:
        masks.apply(view)
    view.model.eval()
    shapes = _input_shapes(view, forward or view.forward, batch)
    trial = partial(_trial, rounds=rounds, clock=clock)
    choices, places = [], []
    for weight in view.weights.values():
        for module, use in zip(weight.modules, weight.uses, strict=True):
            choice, fast = _choose(use, weight, module, shapes.get(module), trial, margin)
            choices.append(choice)
            if fast is not None:
                places += _places(view.model, module, fast)
    return Accelerated(view, choices, places)


def _input_shapes(view: PrunableView, forward: Callable[[Any], Any], batch: Any) -> dict[nn.Module, torch.Size]:
    """Return the shape of the largest input of each layer that is called in a forward pass."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shape = arguments[0].shape if arguments else torch.Size()
        if shape.numel() > shapes.get(module, torch.Size([0])).numel():
            shapes[module] = shape

    hooks = [m.register_forward_pre_hook(note) for weight in view.weights.values() for m in weight.modules]
    try:
        forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _choose(
    name: str, weight: PrunableWeight, module: nn.Module, shape: torch.Size | None, trial: Trial, margin: float
) -> tuple[Choice, nn.Module | None]:
    """Return the choice for one layer, and what computes it; None: it stays as it is."""
    matrix = weight.matrix()
    kept = float(matrix.count_nonzero()) / matrix.numel()
    made = partial(Choice, name, (matrix.shape[0], matrix.shape[1]), kept)
    if shape is None:
        return made(0, DENSE, {}, "it is not called as a layer in this forward pass"), None
    if reason := _more_than_linear(module):
        return made(0, DENSE, {}, reason), None
    tokens = shape[:-1].numel()
    bias = module._parameters.get("bias")
    ways, reasons = candidates(matrix.contiguous(), None if bias is None else bias.detach(), tokens)
    if not ways:
        return made(tokens, DENSE, {}, "; ".join(reasons)), None
    inputs = torch.randn(shape, dtype=matrix.dtype, device=matrix.device)
    layers = {DENSE: module}
    for kind, build in ways.items():
        try:
            layer = build()
            layer(inputs)
            layers[kind] = layer
        except RuntimeError as error:  # this build of torch, or this GPU, has no such kernel
            reasons.append(f"{kind}: {str(error).splitlines()[0]}")
    seconds = trial(layers, inputs)
    best = min(seconds, key=seconds.__getitem__)
    others = [f"{kind} {1000 * each:.2f} ms" for kind, each in seconds.items() if kind not in (DENSE, best)]
    if best != DENSE and seconds[best] > (1 - margin) * seconds[DENSE]:
        others.insert(0, f"{best} {1000 * seconds[best]:.2f} ms, within the noise")
        best = DENSE
    why = "; ".join([*others, *reasons])
    return made(tokens, best, seconds, why), None if best == DENSE else layers[best]


def _more_than_linear(module: nn.Module) -> str:
    """Return why nothing may take a layer's place, since it computes more than a product and a bias; or nothing."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention computes more than this product"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    return ""


def _trial(
    layers: Mapping[str, nn.Module], inputs: Tensor, *, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median of the seconds that each layer takes, in turns."""
    wait: Callable[[], None] = partial(torch.cuda.synchronize, inputs.device) if inputs.is_cuda else lambda: None

    def measure(layer: nn.Module, calls: int) -> float:
        wait()
        begin = clock()
        for _ in range(calls):
            layer(inputs)
        wait()
        return (clock() - begin) / calls

    for layer in layers.values():  # warm
        measure(layer, 1)
    calls = max(1, int(_SHORTEST / max(measure(layers[DENSE], 1), 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            taken[name].append(measure(layer, calls))
    return {name: statistics.median(each) for name, each in taken.items()}


def _places(model: nn.Module, module: nn.Module, fast: nn.Module) -> list[_Place]:
    """Return every place of the model where a layer stands."""
    found = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]
    return [_Place(parent, name, module, fast) for parent, name in found]
