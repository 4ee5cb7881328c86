"""Memory that a plan takes beside the model, from shapes alone: before anything is read, and refused where it does not
fit.

With n prunable weights of w bytes, the largest layer of t weights and i inputs, and for Gram matrices g = the sum of
4 i (i + i / 8) over the layers that are measured together (strips of the upper triangle in float64; that layers which
read the same inputs share one is not counted on), all in bytes:

| part | place | all weights | largest layer or block |
|---|---|---|---|
| masks, packed: one set for each sparsity, and the file of one | host | (n / 8) (sparsities + 1) | |
| scores, comparison with the threshold, keys near it | device | | 32 t + 2^26 a sparsity |
| input_norms, input_means: float64 | device, or host with offload | 8 i over all layers | |
| hessian: of all layers, or sequential of the largest block | device, or host with offload | g | |
| cross; dense_hessian; training and held_out: likewise | device, or host with offload | 2 g; g; 3 g | |
| mean_gradient: in float32 or better | device | max(w, 4) n | max(w, 4) t |
| squared_gradient: the same, beside the gradient of a batch | device | 2 max(w, 4) n | max(w, 4) t |
| learned_scores: score, gradient, moments, masked weight | device | 18 n | 8 t |
| gradient_rows: sum of the rows, gradients of one | device | 8 n | 12 t |
| gradient_rows: those held in memory, by `gradient_rows.fit` | host | as said | |
| a solver: factor, weights as columns, their changes | device | | 12 i^2 + 28 t |
| updated weights of the largest block b, until they are in its file | host | | 3 w b |
| sequential: pruned weights of the largest block b, beside the originals | device | | w b |
| block steps: values, gradients, moments, the best values so far | device | | (20 + 3 w) b |

Where the model is on the CPU, both places are the host. Activations and captured calls are not in it: the latter have a
budget of their own, beyond which they lie in a file.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sparsity.allocation.base import LAYER_ERRORS
from sparsity.errors import UserError
from sparsity.run.plan import Plan
from sparsity.run.request import Request
from sparsity.run.sequential import stages
from sparsity.statistics.gradient_rows import human
from sparsity.statistics.hessian import strips
from sparsity.view import PrunableView, PrunableWeight

_WIDE, _DOUBLE = 4, 8
_MASKS = 1 / 8  # bytes a weight
_SELECTION, _SOLVER, _FACTOR = 32, 28, 12  # bytes a weight, and an entry of in x in
_KEYS = 1 << 26  # of scores near one threshold
_LEARNED, _ROW_SUM, _UPDATES, _TRAINED = 18, 8, 3, 20
_GRAMS = {"hessian": 1, "cross": 2, "dense_hessian": 1, "training": 1, "held_out": 2}  # of g; a square has 16 / 9
_TRANSIENT = {"mean_gradient": 4, "squared_gradient": 4, "learned_scores": 8, "gradient_rows": 12}


@dataclass(frozen=True)
class Demand:
    """The facts of a plan that decide its memory.

    statistics: of all axes. sparsities: how many are asked for at once. solver: whether a reconstruction runs.
    sequential: block by block. trains: blocks are trained. offload: sums lie on the host. rows: bytes of gradient rows
    that are held in memory.
    """

    statistics: Collection[str] = ()
    sparsities: int = 1
    solver: bool = False
    sequential: bool = False
    trains: bool = False
    offload: bool = False
    rows: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on the model's device and on the host; without an accelerator, `device` is 0."""

    device: int
    host: int

    def __str__(self) -> str:
        return (f"{human(self.device)} on the device and " if self.device else "") + f"{human(self.host)} on the host"


def demand_of(plan: Plan, request: Request, rows: int = 0) -> Demand:
    """Return what decides the memory of a plan. rows: bytes of gradient rows that are held in memory."""
    # Gram matrices of all layers are there together only where scores made of them are compared between layers.
    alone = plan.by_blocks(request) or (plan.joint(request) and plan.local(request))
    together = plan.statistic == "hessian" and not alone
    return Demand(
        [*plan.statistics, *(["hessian"] if LAYER_ERRORS in plan.allocation.statistics else [])],
        sparsities=max(1, len(request.sparsities)),
        solver=plan.reconstruction is not None,
        sequential=not together and (plan.sequential or plan.refines or plan.probes),
        trains=plan.block_steps > 0,
        offload=plan.offload,
        rows=rows,
    )


def preflight_bytes(demand: Demand, view: PrunableView) -> Memory:
    """Return what the plan takes at most beside the model, as the module's table says."""
    weights = list(view.weights.values())
    largest = max(weight.numel for weight in weights)
    width = max(weight.parameter.element_size() for weight in weights)
    device = _largest_layer(demand, weights, largest)
    host = _MASKS * (demand.sparsities + 1) * view.numel + demand.rows
    # Sums of what is measured: on the device, or on the host where they are offloaded.
    sums = _sums(demand, view)
    device, host = (device, host + sums) if demand.offload else (device + sums, host)
    for statistic, copies in (("mean_gradient", 1), ("squared_gradient", 2)):
        if statistic in demand.statistics:
            device += copies * max(width, _WIDE) * view.numel
    if "learned_scores" in demand.statistics:
        device += _LEARNED * view.numel
    if "gradient_rows" in demand.statistics:
        device += _ROW_SUM * view.numel
    block = max(sum(view.weights[name].numel for name in names) for names in stages(view))
    if demand.sequential:
        device += width * block
    if demand.trains:
        device += (_TRAINED + 3 * width) * block
    if demand.solver or demand.trains:
        host += _UPDATES * width * block
    if weights[0].parameter.is_cpu:
        return Memory(0, int(device + host))
    return Memory(int(device), int(host))


def _largest_layer(demand: Demand, weights: Iterable[PrunableWeight], largest: int) -> float:
    """Bytes on the device while the largest layer is worked on."""
    taken = _SELECTION * largest + _KEYS * demand.sparsities
    taken += largest * max((_TRANSIENT.get(statistic, 0) for statistic in demand.statistics), default=0)
    if "hessian" in demand.statistics:
        taken += max(_FACTOR * weight.shape[1] ** 2 + _SOLVER * weight.numel for weight in weights)
    return taken


def _sums(demand: Demand, view: PrunableView) -> int:
    """Bytes of the sums over the layers' inputs that are held at a time."""
    together = stages(view) if demand.sequential else [list(view.weights)]
    total = 0
    for statistic in demand.statistics:
        if statistic in ("input_norms", "input_means", "dense_means"):
            total += max(sum(_DOUBLE * view.weights[name].shape[1] for name in names) for names in together)
        elif statistic in _GRAMS:
            size = max(sum(_gram(view.weights[name].shape[1]) for name in names) for names in together)
            total += _GRAMS[statistic] * size
    return total


def _gram(inputs: int) -> int:
    """Bytes of a Gram matrix as strips."""
    *_, (_, last) = strips(inputs)
    return _DOUBLE * last.stop


def check_memory(needed: Memory, free: Memory, demand: Demand) -> None:
    """Raise UserError, in one line that says what would make it fit, where a plan needs more memory than is free.

    free: as read before the run, after the model was loaded.
    """
    if told := lacking(needed, free):
        remedies = _remedies(demand, device=needed.device > free.device)
        raise UserError(f"pruning needs {told}: {', or '.join(remedies)}")


def lacking(needed: Memory, free: Memory) -> str:
    """Return where more is needed than is free, for a message; nothing where all fits."""
    places = (("the device", needed.device, free.device), ("the host", needed.host, free.host))
    short = [(place, wanted, there) for place, wanted, there in places if wanted > there]
    told = " and ".join(f"{human(wanted)} on {place}, where {human(there)} are free" for place, wanted, there in short)
    return told and f"{told}, besides the model and its activations"


def _remedies(demand: Demand, *, device: bool) -> list[str]:
    """Return what the user can do, the least costly first."""
    found = []
    if device and not demand.offload and {"hessian", "input_norms", "input_means"} & set(demand.statistics):
        found.append("give --offload, which holds statistics on the host")
    if "hessian" in demand.statistics and not demand.sequential:
        found.append("--calibration_mode sequential, which holds those of one block")
    if demand.rows:
        found.append("a lower --memory_budget or --row_dtype bfloat16")
    if demand.sparsities > 1:
        found.append("fewer --sparsities at once")
    if {"learned_scores", "mean_gradient", "squared_gradient"} & set(demand.statistics):
        found.append("a method without gradients")
    return [*found, "a machine with more memory"]
